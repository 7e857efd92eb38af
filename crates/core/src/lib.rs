//! Decisions of a node as pure state machines: no sockets, no clock, no randomness of their own.
//!
//! Each machine is told what happened and what time it is ([`time::Now`]), and answers what to do. The shells around them (the
//! `net` and `node` crates) do it; the simulator (`sim`) runs a thousand of them in one thread, with a seed that
//! reproduces any failure.
//!
//! - [`membership`]: who is in the mesh, and how that stays true with copies that are late, lost, doubled or lied about.
//! - [`overlay`]: the graph on which records are broadcast, and how it is kept whole without being disturbed.
//! - [`health`]: what is known of each peer from dealing with it.
//! - [`prefix`] and [`router`]: which peer gets a request, in predicted milliseconds.
//! - [`planner`]: which nodes hold which layers of a model that is split, in predicted time.
//! - [`request`]: a request's way from its first peer to its last token, whoever dies meanwhile.
//! - [`swarm`]: from whom which part of a model's file is fetched.

pub mod health;
pub mod membership;
pub mod overlay;
pub mod planner;
pub mod prefix;
pub mod request;
pub mod router;
pub mod swarm;
pub mod time;
