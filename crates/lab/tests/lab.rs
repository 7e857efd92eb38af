//! Real packets of the kernel's own stack through real namespaces. Needs root and TUN devices; without, every test says so and
//! passes.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use murmur_lab::{Host, Lab, Link, NatKind, Site, Topology, Wire};

/// For what must come: far longer than it takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// For what must not come. Too short a wait could hide a fault but not invent one; the counters say that it was dropped.
const SILENCE: Duration = Duration::from_millis(100);

fn lab(topology: &Topology) -> Option<Lab> {
    if let Some(missing) = Lab::missing() {
        eprintln!("skipped: {missing}");
        return None;
    }
    match Lab::new(topology) {
        Err(murmur_lab::LabError::Missing(missing)) => {
            eprintln!("skipped: {missing}");
            None
        }
        lab => Some(lab.unwrap()),
    }
}

fn udp(lab: &Lab, host: &str) -> UdpSocket {
    let socket = lab.host(host).unwrap().enter(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn address(lab: &Lab, host: &str, socket: &UdpSocket) -> SocketAddr {
    (lab.host(host).unwrap().address(), socket.local_addr().unwrap().port()).into()
}

/// Answers every packet with itself until a packet is empty.
fn echo(socket: UdpSocket) {
    let mut buffer = [0; 2000];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        if length == 0 {
            return;
        }
        socket.send_to(&buffer[..length], from).unwrap();
    }
}

/// Measures anew until a figure is as it should be. A busy machine makes things later now and then, but not for ever.
fn until_measured<T: std::fmt::Debug>(mut measure: impl FnMut() -> T, is_right: impl Fn(&T) -> bool) {
    let started = Instant::now();
    loop {
        let measured = measure();
        if is_right(&measured) {
            return;
        }
        eprintln!("measured {measured:?}, which is not as it should be");
        assert!(started.elapsed() < PATIENCE, "it never was");
    }
}

/// One packet there and back.
fn round_trip(socket: &UdpSocket, to: SocketAddr, number: u32) -> Option<Duration> {
    let sent = Instant::now();
    socket.send_to(&number.to_be_bytes(), to).unwrap();
    let mut buffer = [0; 4];
    loop {
        socket.recv(&mut buffer).ok()?;
        // An answer that came after its time-out is not ours.
        if u32::from_be_bytes(buffer) == number {
            return Some(sent.elapsed());
        }
    }
}

/// Two hosts, `a` asks and `b` answers.
fn with_echo(topology: &Topology, test: impl FnOnce(&Lab, &UdpSocket, SocketAddr)) {
    let Some(lab) = lab(topology) else { return };
    let (asking, answering) = (udp(&lab, "a"), udp(&lab, "b"));
    let to = address(&lab, "b", &answering);
    let end = answering.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| echo(answering));
        test(&lab, &asking, to);
        // From its own host, so that no fault of the link keeps the answering thread.
        end.send_to(&[], ("127.0.0.1", to.port())).unwrap();
    });
}

#[test]
fn a_round_trip_takes_the_delay_that_was_asked_for() {
    let mut topology = Topology::of_hosts(["a", "b"]);
    topology.hosts[0].up = Link::delay(7.0);
    topology.default_route = Link::delay(3.5);
    with_echo(&topology, |lab, socket, to| {
        let mut numbers = 0..;
        let mut trip = || round_trip(socket, to, numbers.next().unwrap()).unwrap();
        let mut delayed = || {
            let took = trip();
            assert!(took >= Duration::from_millis(14), "{took:?} is less than was asked for");
            took
        };
        until_measured(&mut delayed, |took| *took < Duration::from_millis(17));
        lab.set_link(&Wire::Up("a".into()), &Link::default()).unwrap();
        lab.set_route("a", "b", &Link::default()).unwrap();
        until_measured(trip, |took| *took < Duration::from_millis(3));
    });
}

#[test]
fn jitter_spreads_the_delays_over_its_range() {
    let mut topology = Topology::of_hosts(["a", "b"]);
    topology.hosts[1].down = Link { jitter_ms: 10.0, ..Link::delay(2.0) };
    with_echo(&topology, |_, socket, to| {
        let mut numbers = 0..;
        let mut trip = || round_trip(socket, to, numbers.next().unwrap()).unwrap().as_secs_f64() * 1e3;
        let hundred = || {
            let mut trips: Vec<f64> = (0..100).map(|_| trip()).collect();
            trips.sort_by(f64::total_cmp);
            assert!(trips[0] >= 2.0, "{trips:?}");
            trips
        };
        until_measured(hundred, |trips| trips[10] < 7.0 && trips[90] > 7.0);
    });
}

#[test]
fn cut_off_hosts_hear_nothing_until_they_are_let_back_in() {
    with_echo(&Topology::of_hosts(["a", "b", "c"]), |lab, socket, to| {
        type Change<'a> = Box<dyn Fn() + 'a>;
        let up = Wire::Up("a".into());
        let changes: [(Change<'_>, Change<'_>); 3] = [
            (Box::new(|| lab.partition(&[&["a"], &["b", "c"]]).unwrap()), Box::new(|| lab.heal())),
            (Box::new(|| lab.isolate("b").unwrap()), Box::new(|| lab.rejoin("b").unwrap())),
            (
                Box::new(|| lab.set_link(&up, &Link::lossy(1.0)).unwrap()),
                Box::new(|| lab.set_link(&up, &Link::default()).unwrap()),
            ),
        ];
        for (number, (cut, heal)) in (0..).zip(changes) {
            assert!(round_trip(socket, to, 10 * number).is_some());
            cut();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            assert_eq!(round_trip(socket, to, 10 * number + 1), None);
            heal();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            assert!(round_trip(socket, to, 10 * number + 2).is_some());
        }
        assert_eq!(lab.counters().cut_off, 2);
        assert_eq!(lab.counters().lost, 1);
    });
}

#[test]
fn each_kind_of_nat_maps_and_filters_by_its_definition() {
    let mut topology =
        Topology::of_hosts(["server", "stranger"]).with_site(Site::new("home").behind(NatKind::FullCone));
    topology = topology.with_host(Host::new("a").at("home"));
    let Some(lab) = lab(&topology) else { return };
    let server = udp(&lab, "server");
    let other_port = udp(&lab, "server");
    let stranger = udp(&lab, "stranger");
    let at_server = address(&lab, "server", &server);
    let outer_address = lab.nat_address("home").unwrap().unwrap();
    for (kind, lets_in) in [
        (NatKind::FullCone, &[1, 2, 3][..]),
        (NatKind::RestrictedCone, &[2, 3]),
        (NatKind::PortRestrictedCone, &[3]),
        (NatKind::Symmetric, &[3]),
    ] {
        lab.set_nat("home", kind).unwrap();
        let inside = udp(&lab, "a");
        let mut buffer = [0; 10];
        inside.send_to(&[0], at_server).unwrap();
        let (_, seen) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(seen.ip(), outer_address, "{kind:?}");
        // Without delay packets keep their order, so what was let in comes before the last, which always is.
        stranger.send_to(&[1], seen).unwrap();
        other_port.send_to(&[2], seen).unwrap();
        server.send_to(&[3], seen).unwrap();
        for number in lets_in {
            let (_, from) = inside.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[0], *number, "{kind:?}");
            assert_ne!(from.ip(), outer_address, "{kind:?}");
        }
        inside.send_to(&[0], address(&lab, "server", &other_port)).unwrap();
        let (_, seen_by_other) = other_port.recv_from(&mut buffer).unwrap();
        assert_eq!(seen == seen_by_other, kind != NatKind::Symmetric, "{kind:?}");
    }
}

#[test]
fn tcp_goes_through_a_nat_with_its_data_intact() {
    let topology = Topology::of_hosts(["server"])
        .with_site(Site::new("home").behind(NatKind::Symmetric))
        .with_host(Host::new("a").at("home"));
    let Some(lab) = lab(&topology) else { return };
    let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
    let received = transfer(&lab, "a", "server", &sent).0;
    assert!(received == sent);
}

/// Sends bytes over TCP; returns what arrived and how long it took from the first byte to the last.
fn transfer(lab: &Lab, from: &str, to: &str, data: &[u8]) -> (Vec<u8>, Duration) {
    let listener = lab.host(to).unwrap().enter(|| TcpListener::bind("0.0.0.0:0")).unwrap().unwrap();
    let end = (lab.host(to).unwrap().address(), listener.local_addr().unwrap().port());
    thread::scope(|scope| {
        scope.spawn(|| {
            let connected = lab.host(from).unwrap().enter(|| TcpStream::connect(end)).unwrap();
            connected.unwrap().write_all(data).unwrap();
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut received = vec![0];
        stream.read_exact(&mut received).unwrap();
        let first = Instant::now();
        stream.read_to_end(&mut received).unwrap();
        (received, first.elapsed())
    })
}

#[test]
fn a_rate_is_what_tcp_gets_and_not_more() {
    let mut topology = Topology::of_hosts(["a", "b"]);
    topology.hosts[0].up = Link { delay_ms: 5.0, ..Link::rate(20.0) };
    let Some(lab) = lab(&topology) else { return };
    let data = vec![7; 2_000_000];
    let rate_mbit_s = || {
        let (received, took) = transfer(&lab, "a", "b", &data);
        assert_eq!(received.len(), data.len());
        data.len() as f64 * 8.0 / took.as_secs_f64() / 1e6
    };
    // Headers take 4 %. The receiver may have fallen behind the first byte by what the buffers hold.
    until_measured(rate_mbit_s, |mbit_s| (8.0..22.0).contains(mbit_s));
}

#[test]
fn multicast_reaches_the_hosts_of_the_same_site() {
    let topology = Topology::default()
        .with_site(Site::new("home").behind(NatKind::FullCone))
        .with_host(Host::new("a").at("home"))
        .with_host(Host::new("b").at("home"));
    let Some(lab) = lab(&topology) else { return };
    let group = Ipv4Addr::new(224, 0, 0, 251);
    let listen = || {
        let socket = UdpSocket::bind("0.0.0.0:5353")?;
        socket.join_multicast_v4(&group, &Ipv4Addr::UNSPECIFIED)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok::<_, std::io::Error>(socket)
    };
    let listening = lab.host("b").unwrap().enter(listen).unwrap().unwrap();
    udp(&lab, "a").send_to(b"who is there", (group, 5353)).unwrap();
    let mut buffer = [0; 100];
    let (length, from) = listening.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"who is there");
    assert_eq!(from.ip(), lab.host("a").unwrap().address());
}

#[test]
fn programs_run_on_their_host_and_know_the_others_by_name() {
    let Some(lab) = lab(&Topology::of_hosts(["a", "b"])) else { return };
    let host = lab.host("a").unwrap();
    let ask = || {
        let started = Instant::now();
        let output = host
            .command("sh")
            .args(["-c", "getent hosts b; getent ahostsv4 nobody.example || echo unknown; ip -o -4 address show eth0"])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with(&lab.host("b").unwrap().address().to_string()), "{text}");
        assert!(text.contains(&host.address().to_string()), "{text}");
        assert!(text.contains("unknown"), "{text}");
        started.elapsed()
    };
    // A resolver waits five seconds for a name server.
    until_measured(ask, |took| *took < Duration::from_secs(4));
}

#[test]
fn killing_a_host_kills_its_programs_and_no_others() {
    let Some(lab) = lab(&Topology::of_hosts(["a", "b"])) else { return };
    let mut on_a = sleeping(&lab, "a");
    let mut on_b = sleeping(&lab, "b");
    assert_eq!(lab.host("a").unwrap().kill_programs().unwrap(), 1);
    assert_eq!(on_a.wait().unwrap().signal(), Some(9));
    assert!(on_b.try_wait().unwrap().is_none());
    drop(lab);
    assert_eq!(on_b.wait().unwrap().signal(), Some(9), "nothing outlives the lab");
}

/// A program that has certainly begun to run in its host.
fn sleeping(lab: &Lab, host: &str) -> Child {
    let mut command = lab.host(host).unwrap().command("sh");
    let mut child = command.args(["-c", "echo; exec sleep 1000"]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    child
}

#[test]
fn twenty_hosts_stand_and_nothing_of_them_remains() {
    let names: Vec<String> = (0..20).map(|n| format!("node-{n}")).collect();
    let started = Instant::now();
    let Some(lab) = lab(&Topology::of_hosts(names.iter().map(String::as_str))) else { return };
    eprintln!("20 hosts in {:?}", started.elapsed());
    let first = lab.host("node-0").unwrap();
    let entry = first.command("true");
    let namespace = entry.get_args().nth(2).unwrap().to_owned();
    let place = |folder: &str| PathBuf::from(folder).join(&namespace);
    assert!(place("/run/netns").exists());
    let (asking, answering) = (udp(&lab, "node-0"), udp(&lab, "node-19"));
    asking.send_to(b"here", address(&lab, "node-19", &answering)).unwrap();
    assert_eq!(answering.recv(&mut [0; 10]).unwrap(), 4);
    assert_eq!(lab.counters().malformed, 0, "no host speaks IPv6");
    drop(lab);
    assert!(!place("/run/netns").exists());
    assert!(!place("/etc/netns").exists());
}

fn run_command(name: &str, topology: &str) -> Child {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.toml"));
    fs::write(&path, topology).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_murmur-lab"));
    command.arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn the_next_lab_removes_what_a_killed_one_left_behind() {
    if lab(&Topology::default()).is_none() {
        return;
    }
    let mut killed =
        run_command("killed", "[[host]]\nname = \"a\"\nrun = [\"sh\", \"-c\", \"echo $$; exec sleep 1000\"]");
    let lines = BufReader::new(killed.stdout.take().unwrap()).lines();
    let lines: Vec<String> = lines.take(2).map(Result::unwrap).collect();
    let namespace = PathBuf::from("/run/netns").join(lines[0].split(' ').rev().nth(1).unwrap());
    let program = PathBuf::from("/proc").join(lines[1].strip_prefix("a | ").unwrap());
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(namespace.exists() && program.exists());
    drop(lab(&Topology::default()));
    assert!(!namespace.exists());
    // Killed, but perhaps still waiting for whoever inherited it.
    let state = fs::read_to_string(program.join("stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z"), "{state}");
}

#[test]
fn the_command_runs_programs_and_does_what_it_is_told() {
    if lab(&Topology::default()).is_none() {
        return;
    }
    let mut child = run_command("told", "[[host]]\nname = \"a\"\n[[host]]\nname = \"b\"");
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().skip(2).map(Result::unwrap);
    let mut tell = |line: &str| {
        writeln!(input, "{line}").unwrap();
        lines.next().unwrap()
    };
    assert_eq!(tell("up a { delay_ms = 20 }"), "done");
    assert_eq!(tell("up c { delay_ms = 20 }"), "error: the lab has no host `c`");
    assert_eq!(tell("dance"), "error: `dance` is not understood; `help` lists what is");
    assert_eq!(tell("run a sh -c exit"), "done");
    assert_eq!(lines.next().unwrap(), "a: exit status: 0");
    writeln!(input, "quit").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_command_removes_everything_when_it_is_ended() {
    if lab(&Topology::default()).is_none() {
        return;
    }
    let mut child = run_command("ended", "[[host]]\nname = \"a\"");
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let namespace = PathBuf::from("/run/netns").join(line.split(' ').rev().nth(1).unwrap());
    assert!(namespace.exists(), "{line}");
    assert!(Command::new("sh").args(["-c", &format!("kill {}", child.id())]).status().unwrap().success());
    assert!(child.wait().unwrap().success());
    assert!(!namespace.exists());
}
