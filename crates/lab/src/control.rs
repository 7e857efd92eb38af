//! What can be told to a lab that runs as a command: one line each on its standard input, so that a person at a terminal and a
//! program in any language can change the network while others run in it.

use std::{fmt::Display, str::FromStr};

use murmur_lab::{Lab, LabError, Link, NatSettings, Wire};
use serde::{Deserialize, de::DeserializeOwned};

/// What `help` prints.
pub(crate) const HELP: &str = "\
up HOST {LINK}           from a host to the network; LINK is as in the topology: delay_ms = 20, loss = 0.1
down HOST {LINK}         from the network to a host
site-up SITE {LINK}      from a site to the world
site-down SITE {LINK}    from the world to a site
route FROM TO {LINK}     from one site to another, this direction only
nat SITE {NAT}           restart a NAT as another: kind = \"symmetric\"
partition A,B C,D        split the hosts into these parts, and one of all others
isolate HOST             cut a host off from everyone
rejoin HOST              let it back in
heal                     end every partition and isolation
kill HOST                kill all programs of a host
run HOST PROGRAM...      start a program on a host
counters                 what became of the packets
quit                     end everything";

/// One line.
#[derive(Debug, PartialEq)]
pub(crate) enum Control {
    /// Replace one direction of a link.
    SetLink(Wire, Link),
    /// Replace a NAT.
    SetNat(String, NatSettings),
    /// Split the hosts.
    Partition(Vec<Vec<String>>),
    /// Cut a host off.
    Isolate(String),
    /// Let it back in.
    Rejoin(String),
    /// End partitions and isolations.
    Heal,
    /// Kill the programs of a host.
    Kill(String),
    /// Start a program on a host.
    Run(String, Vec<String>),
    /// Print the counters.
    Counters,
    /// Print the commands.
    Help,
    /// End.
    Quit,
}

impl FromStr for Control {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let (words, table) = match line.find('{') {
            Some(at) => (&line[..at], Some(&line[at..])),
            None => (line, None),
        };
        let words: Vec<&str> = words.split_whitespace().collect();
        let name = |at: usize| words[at].to_owned();
        Ok(match (words.as_slice(), table) {
            (["up", _], Some(link)) => Self::SetLink(Wire::Up(name(1)), parse(link)?),
            (["down", _], Some(link)) => Self::SetLink(Wire::Down(name(1)), parse(link)?),
            (["site-up", _], Some(link)) => Self::SetLink(Wire::SiteUp(name(1)), parse(link)?),
            (["site-down", _], Some(link)) => Self::SetLink(Wire::SiteDown(name(1)), parse(link)?),
            (["route", _, _], Some(link)) => Self::SetLink(Wire::Route(name(1), name(2)), parse(link)?),
            (["nat", _], Some(nat)) => Self::SetNat(name(1), parse(nat)?),
            (["partition", parts @ ..], None) if !parts.is_empty() => {
                let names = |part: &&str| part.split(',').map(str::to_owned).collect();
                Self::Partition(parts.iter().map(names).collect())
            }
            (["isolate", _], None) => Self::Isolate(name(1)),
            (["rejoin", _], None) => Self::Rejoin(name(1)),
            (["heal"], None) => Self::Heal,
            (["kill", _], None) => Self::Kill(name(1)),
            (["run", ..], _) => {
                // Braces belong to the program here.
                let mut words = line.split_whitespace().skip(1).map(str::to_owned);
                let host = words.next().ok_or("which host?")?;
                Self::Run(host, words.collect())
            }
            (["counters"], None) => Self::Counters,
            (["help"], None) => Self::Help,
            (["quit"], None) => Self::Quit,
            _ => return Err(format!("`{line}` is not understood; `help` lists what is")),
        })
    }
}

/// Reads `{ delay_ms = 20 }` as the topology file does.
fn parse<T: DeserializeOwned>(table: &str) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Wrapped<T> {
        value: T,
    }
    let wrapped: Result<Wrapped<T>, _> = toml::from_str(&format!("value = {table}"));
    wrapped.map(|it| it.value).map_err(|error| error.message().to_owned())
}

impl Control {
    /// Does what only needs the lab. None where the caller has to act: `Run` and `Quit`.
    pub(crate) fn apply(&self, lab: &Lab) -> Option<Result<String, LabError>> {
        let done = |result: Result<(), LabError>| Some(result.map(|()| "done".to_owned()));
        match self {
            Self::SetLink(wire, link) => done(lab.set_link(wire, link)),
            Self::SetNat(site, nat) => done(lab.set_nat(site, *nat)),
            Self::Partition(parts) => {
                let parts: Vec<Vec<&str>> =
                    parts.iter().map(|part| part.iter().map(String::as_str).collect()).collect();
                done(lab.partition(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>()))
            }
            Self::Isolate(host) => done(lab.isolate(host)),
            Self::Rejoin(host) => done(lab.rejoin(host)),
            Self::Heal => {
                lab.heal();
                done(Ok(()))
            }
            Self::Kill(host) => {
                let killed = lab.host(host).and_then(|host| host.kill_programs());
                Some(killed.map(|count| format!("killed {count}")))
            }
            Self::Counters => Some(Ok(counters(lab))),
            Self::Help => Some(Ok(HELP.to_owned())),
            Self::Run(..) | Self::Quit => None,
        }
    }
}

fn counters(lab: &Lab) -> String {
    let all = lab.counters();
    let mut lines = vec![
        line("delivered", all.delivered),
        line("lost", all.lost),
        line("queue full", all.queue_full),
        line("cut off", all.cut_off),
        line("refused by NAT", all.refused_by_nat),
        line("no route", all.no_route),
        line("malformed", all.malformed),
        line("too many", all.too_many),
    ];
    for host in lab.hosts() {
        let count = host.counters();
        let (sent, received) = (count.sent_bytes, count.received_bytes);
        lines.push(line(host.name(), format!("{sent} bytes sent, {received} received")));
    }
    lines.join("\n")
}

fn line(name: &str, value: impl Display) -> String {
    format!("{name:16} {value}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use murmur_lab::NatKind;

    #[test]
    fn lines_say_what_the_library_can_do() {
        let link = |wire, link| Control::SetLink(wire, link);
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        for (text, control) in [
            ("up a { delay_ms = 20 }", link(Wire::Up("a".into()), Link::delay(20.0))),
            ("route a b {loss=1.0}", link(Wire::Route("a".into(), "b".into()), Link::lossy(1.0))),
            ("nat home { kind = \"symmetric\" }", Control::SetNat("home".into(), NatKind::Symmetric.into())),
            ("partition a,b c", Control::Partition(vec![names(&["a", "b"]), names(&["c"])])),
            ("run a echo {1,2}", Control::Run("a".into(), names(&["echo", "{1,2}"]))),
            ("heal", Control::Heal),
        ] {
            assert_eq!(text.parse::<Control>(), Ok(control));
        }
    }

    #[test]
    fn nonsense_is_answered_and_not_acted_on() {
        for (text, reason) in [
            ("", "not understood"),
            ("up a", "not understood"),
            ("heal { }", "not understood"),
            ("partition", "not understood"),
            ("up a { latency = 1 }", "unknown field"),
            ("up a { delay_ms = ", "`"),
            ("run", "which host"),
        ] {
            let error = text.parse::<Control>().unwrap_err();
            assert!(error.contains(reason) || reason == "`", "{text}: {error}");
        }
    }
}
