//! What the lab itself costs: `cargo run -p murmur-lab --example measure` (as root) prints what a link without properties adds
//! to a round trip, how exact delays are, and what TCP and UDP get through it.

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() -> anyhow::Result<()> {
    linux::main()
}

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        io::{self, Read, Write},
        net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
        thread,
        time::{Duration, Instant},
    };

    use murmur_lab::{Lab, Link, Topology};

    const ROUND_TRIPS: usize = 1000;
    const TCP_BYTES: usize = 200_000_000;
    const PATIENCE: Duration = Duration::from_secs(10);

    pub(super) fn main() -> anyhow::Result<()> {
        let lab = Lab::new(&Topology::of_hosts(["a", "b"]))?;
        let loopback = UdpSocket::bind("127.0.0.1:0")?;
        let to = loopback.local_addr()?;
        report("loopback, without the lab", round_trips(&UdpSocket::bind("127.0.0.1:0")?, loopback, to)?)?;
        for (name, link) in [
            ("lab, no delay", Link::default()),
            ("lab, 10 ms each way", Link::delay(10.0)),
            ("lab, 10 ms + 0..5 ms jitter each way", Link { jitter_ms: 5.0, ..Link::delay(10.0) }),
        ] {
            lab.set_route("a", "b", &link)?;
            let asking = lab.host("a")?.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
            let answering = lab.host("b")?.enter(|| UdpSocket::bind("0.0.0.0:0"))??;
            let to = (lab.host("b")?.address(), answering.local_addr()?.port()).into();
            report(name, round_trips(&asking, answering, to)?)?;
        }
        for (name, link) in [
            ("TCP, no delay", Link::default()),
            ("TCP, 2 ms each way", Link::delay(2.0)),
            ("TCP, 100 Mbit/s, 5 ms each way", Link { delay_ms: 5.0, ..Link::rate(100.0) }),
        ] {
            lab.set_route("a", "b", &link)?;
            let bytes = if link.rate_mbit_s.is_some() { TCP_BYTES / 5 } else { TCP_BYTES };
            let (connect_ms, mbit_s) = tcp(&lab, bytes)?;
            // The time to connect is one round trip: it shows that the link is the one that the line names.
            writeln!(io::stdout(), "{name:40} connects in {connect_ms:.1} ms, then {mbit_s:.0} Mbit/s")?;
        }
        writeln!(io::stdout(), "{:?}", lab.counters())?;
        Ok(())
    }

    fn report(name: &str, mut trips_us: Vec<f64>) -> io::Result<()> {
        trips_us.sort_by(f64::total_cmp);
        let at = |part: f64| trips_us[((trips_us.len() - 1) as f64 * part) as usize];
        let (least, half, most) = (at(0.0), at(0.5), at(0.99));
        writeln!(io::stdout(), "{name:40} round trip, us: min {least:.0}, median {half:.0}, p99 {most:.0}")
    }

    fn round_trips(asking: &UdpSocket, answering: UdpSocket, to: SocketAddr) -> io::Result<Vec<f64>> {
        asking.set_read_timeout(Some(PATIENCE))?;
        answering.set_read_timeout(Some(PATIENCE))?;
        thread::scope(|scope| {
            let echo = scope.spawn(move || {
                let mut buffer = [0; 64];
                for _ in 0..ROUND_TRIPS {
                    let (length, from) = answering.recv_from(&mut buffer)?;
                    answering.send_to(&buffer[..length], from)?;
                }
                io::Result::Ok(())
            });
            let mut trips_us = Vec::with_capacity(ROUND_TRIPS);
            for _ in 0..ROUND_TRIPS {
                let sent = Instant::now();
                asking.send_to(&[7; 64], to)?;
                asking.recv(&mut [0; 64])?;
                trips_us.push(sent.elapsed().as_secs_f64() * 1e6);
            }
            echo.join().map_err(|_| io::Error::other("the echo panicked"))??;
            Ok(trips_us)
        })
    }

    /// Milliseconds to connect, and megabits per second of the data.
    fn tcp(lab: &Lab, bytes: usize) -> anyhow::Result<(f64, f64)> {
        let listener = lab.host("b")?.enter(|| TcpListener::bind("0.0.0.0:0"))??;
        let to = (lab.host("b")?.address(), listener.local_addr()?.port());
        let (connected, connect_ms) = lab.host("a")?.enter(|| {
            let started = Instant::now();
            (TcpStream::connect(to), started.elapsed().as_secs_f64() * 1e3)
        })?;
        let mut sending = connected?;
        let (mut receiving, _) = listener.accept()?;
        let started = Instant::now();
        let sender = thread::spawn(move || {
            let block = vec![7; 128 * 1024];
            let mut left = bytes;
            while left > 0 {
                let length = left.min(block.len());
                sending.write_all(&block[..length])?;
                left -= length;
            }
            io::Result::Ok(())
        });
        let mut buffer = vec![0; 256 * 1024];
        let mut received = 0;
        while received < bytes {
            match receiving.read(&mut buffer)? {
                0 => anyhow::bail!("the connection ended after {received} bytes"),
                length => received += length,
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok((connect_ms, bytes as f64 * 8.0 / seconds / 1e6))
    }
}
