//! The thread that carries packets: from the TUN devices into the fabric, and out of it when their time has come.
//!
//! One thread for all hosts. It waits for any device or the next due packet, whichever is first, then does everything that can
//! be done now. More threads would have to agree on the order of packets, and would take cores from the programs that are
//! measured. The timer has nanosecond steps (`epoll_pwait2`); the thread's timer slack, 50 us by default, is taken off.

use std::{
    io,
    num::NonZeroU64,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    buffer::spare_capacity,
    event::{EventfdFlags, Timespec, epoll, eventfd},
};
use tun_rs::SyncDevice;

use crate::{
    LabError,
    error::Trying,
    fabric::{Delivery, Fabric},
    topology::HOSTS_MAX,
};

/// The largest IP packet.
const PACKET_BYTES_MAX: usize = 65_535;
/// Packets taken from one device before it is another's turn.
const BATCH_PACKETS: usize = 32;
/// The event that ends the thread; hosts have lower numbers.
const STOP: u64 = u64::MAX;

/// The running thread; ended and joined on drop.
#[derive(Debug)]
pub(crate) struct Router {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// The fabric at this moment. A panic elsewhere leaves it usable: every call finishes what it changes.
pub(crate) fn lock(fabric: &Mutex<Fabric>) -> MutexGuard<'_, Fabric> {
    fabric.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Router {
    /// Starts carrying packets. `devices` are in the order of the fabric's hosts, and never wait.
    pub(crate) fn start(devices: Vec<SyncDevice>, fabric: Arc<Mutex<Fabric>>) -> Result<Self, LabError> {
        let action = || "starting the router".to_owned();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).trying(action)?;
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC).trying(action)?;
        epoll::add(&ready, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN).trying(action)?;
        for (host, device) in devices.iter().enumerate() {
            let data = epoll::EventData::new_u64(host as u64);
            epoll::add(&ready, device, data, epoll::EventFlags::IN).trying(action)?;
        }
        let carrier = Carrier {
            devices,
            fabric,
            ready,
            started: Instant::now(),
            buffer: vec![0; PACKET_BYTES_MAX],
            deliveries: Vec::new(),
        };
        let thread =
            std::thread::Builder::new().name("lab-router".into()).spawn(move || carrier.run()).trying(action)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            // The thread would be waited for in vain.
            tracing::error!(%error, "the lab's router cannot be stopped");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the lab's router panicked");
        }
    }
}

struct Carrier {
    devices: Vec<SyncDevice>,
    fabric: Arc<Mutex<Fabric>>,
    ready: OwnedFd,
    started: Instant,
    buffer: Vec<u8>,
    deliveries: Vec<Delivery>,
}

impl Carrier {
    fn run(mut self) {
        if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
            tracing::warn!(%error, "delays will be up to 50 us longer");
        }
        let mut events = Vec::with_capacity(HOSTS_MAX + 1);
        loop {
            let wait = self.until_due();
            events.clear();
            match epoll::wait(&self.ready, spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the lab's router ends");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    STOP => return,
                    host => self.take_from(host as usize),
                }
            }
            let now_ns = self.now_ns();
            lock(&self.fabric).advance(now_ns, &mut self.deliveries);
            self.hand_out();
        }
    }

    /// Nanoseconds since the start: 64 bits are enough for 584 years.
    fn now_ns(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    /// None: until a device or the stop wakes us.
    fn until_due(&self) -> Option<Timespec> {
        let next_ns = lock(&self.fabric).next_ns()?;
        let wait = Duration::from_nanos(next_ns.saturating_sub(self.now_ns()));
        Some(Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) })
    }

    fn take_from(&mut self, host: usize) {
        for _ in 0..BATCH_PACKETS {
            match self.devices[host].recv(&mut self.buffer) {
                Ok(length) => {
                    let bytes = self.buffer[..length].to_vec();
                    let now_ns = self.now_ns();
                    lock(&self.fabric).send(host, bytes, now_ns, &mut self.deliveries);
                    self.hand_out();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // It would be reported as ready for ever.
                    tracing::warn!(host, %error, "a host's interface is gone");
                    let _ = epoll::delete(&self.ready, &self.devices[host]);
                    return;
                }
            }
        }
    }

    fn hand_out(&mut self) {
        for Delivery { host, packet } in self.deliveries.drain(..) {
            // A host that has set its interface down receives nothing; others do not care.
            if let Err(error) = self.devices[host].send(packet.bytes()) {
                tracing::debug!(host, %error, "a packet did not get into its host");
            }
        }
    }
}
