//! One host of a lab: a named network namespace with one TUN device as its only way out.
//!
//! The TUN device is opened by a thread that has moved into the namespace, so that it is born there and every host can call its
//! own `eth0`. The open device is then used from outside: a file descriptor does not care where its user is.

use std::{
    fs::{self, File},
    io::Write,
    net::Ipv4Addr,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    process::{Pid, Signal},
    thread::LinkNameSpaceType,
};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::{LabError, error::Trying};

const NAMESPACES: &str = "/run/netns";
/// `ip netns exec` shows the files of a namespace's folder here to its programs as those of `/etc`.
const CONFIGURATIONS: &str = "/etc/netns";
/// Programs look for interfaces called like this, and pass over those called `tun0`.
const INTERFACE: &str = "eth0";
/// Packets that the kernel keeps for the router before it drops what the host sends.
const SEND_QUEUE_PACKETS: u32 = 1000;
const TUN_DEVICE: &str = "/dev/net/tun";
/// What was killed is waited for this long at most, and looked for this often.
const DEATH_MAX: Duration = Duration::from_secs(5);
const DEATH_POLL: Duration = Duration::from_millis(2);

/// Says what this machine or user lacks to run a lab. None where all is there.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it needs root, to make network namespaces and TUN devices".into());
    }
    if let Err(error) = File::options().read(true).write(true).open(TUN_DEVICE) {
        return Some(format!("{TUN_DEVICE} cannot be opened: {error}"));
    }
    let version = Command::new("ip").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_err().then(|| "there is no `ip` program (package iproute2)".into())
}

/// A network namespace, removed on drop together with what runs in it.
#[derive(Debug)]
pub(crate) struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes it, with nothing in it.
    pub(crate) fn create(name: String) -> Result<Self, LabError> {
        ip(&["netns", "add", &name])?;
        let path = Path::new(NAMESPACES).join(&name);
        let opened = File::open(&path).trying(|| format!("opening {}", path.display()));
        opened.inspect_err(|_| remove(&name)).map(|file| Self { name, file })
    }

    /// Runs a closure on a thread inside. Sockets that it opens stay inside, whoever uses them later.
    pub(crate) fn enter<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T, LabError> {
        let entered = std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                rustix::thread::move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
                Ok::<T, rustix::io::Errno>(action())
            });
            inside.join()
        });
        match entered {
            Ok(result) => result.trying(|| format!("entering the namespace {}", self.name)),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// Gives it its interface, and returns what the other end of its wire reads and writes: whole IP packets, never waiting.
    pub(crate) fn plug_in(&self, address: Ipv4Addr, prefix_bits: u8, mtu_bytes: u16) -> Result<SyncDevice, LabError> {
        let device = self.enter(|| {
            // Down, or IPv6 would have begun to look for routers before it is switched off.
            let device = DeviceBuilder::new().name(INTERFACE).enable(false).build_sync()?;
            device.set_nonblocking(true)?;
            // Where the kernel has no IPv6 there is nothing to switch off.
            let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6"), "1");
            Ok::<_, std::io::Error>(device)
        })?;
        let device = device.trying(|| format!("making a TUN device in {}", self.name))?;
        self.configure(&format!(
            "link set lo up\n\
             link set {INTERFACE} mtu {mtu_bytes} txqueuelen {SEND_QUEUE_PACKETS}\n\
             addr add {address}/{prefix_bits} broadcast + dev {INTERFACE}\n\
             link set {INTERFACE} up\n\
             route add default dev {INTERFACE}\n"
        ))?;
        Ok(device)
    }

    /// Programs started by [`command`](Self::command) see this as `/etc/hosts`. Other names have no address, and a name server
    /// that is not there says so at once, where one out of reach is waited for.
    pub(crate) fn set_names(&self, hosts_file: &str) -> Result<(), LabError> {
        let folder = Path::new(CONFIGURATIONS).join(&self.name);
        fs::create_dir_all(&folder).trying(|| format!("creating {}", folder.display()))?;
        for (file, text) in [("hosts", hosts_file), ("resolv.conf", "nameserver 127.0.0.1\n")] {
            fs::write(folder.join(file), text).trying(|| format!("writing to {}", folder.display()))?;
        }
        Ok(())
    }

    /// A program that will run inside. `ip` becomes the program, so that the child's process is the program's.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Kills everything that runs inside, with SIGKILL, and says how many there were.
    pub(crate) fn kill_programs(&self) -> Result<usize, LabError> {
        kill_programs(&self.name)
    }

    fn configure(&self, batch: &str) -> Result<(), LabError> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().trying(|| "starting `ip`".into())?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(batch.as_bytes()).trying(|| "telling `ip` what to do".into())?;
        }
        let output = child.wait_with_output().trying(|| "waiting for `ip`".into())?;
        finish(&command, &output).map(drop)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes all namespaces whose names begin so, and what runs in them.
pub(crate) fn remove_all(prefix: &str) {
    let names = |folder: &str| -> Vec<PathBuf> {
        fs::read_dir(folder).map_or_else(|_| Vec::new(), |entries| entries.flatten().map(|it| it.path()).collect())
    };
    for path in names(NAMESPACES).into_iter().chain(names(CONFIGURATIONS)) {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.starts_with(prefix)) {
            remove(name);
        }
    }
}

/// Cleaning up goes as far as it can: each step is tried whatever became of the one before.
fn remove(name: &str) {
    let warn = |error: LabError| tracing::warn!(namespace = name, %error, "not all of a lab could be removed");
    if Path::new(NAMESPACES).join(name).exists() {
        kill_programs(name).map_or_else(warn, drop);
        ip(&["netns", "delete", name]).map_or_else(warn, drop);
    }
    let folder = Path::new(CONFIGURATIONS).join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).trying(|| format!("removing {}", folder.display())).unwrap_or_else(warn);
    }
}

fn kill_programs(name: &str) -> Result<usize, LabError> {
    let listed = ip(&["netns", "pids", name])?;
    let own = rustix::process::getpid();
    let pids = listed.lines().filter_map(|line| Pid::from_raw(line.trim().parse().ok()?)).filter(|pid| *pid != own);
    // A program that has ended by itself in the meantime is none that was killed.
    let killed: Vec<Pid> = pids.filter(|pid| rustix::process::kill_process(*pid, Signal::KILL).is_ok()).collect();
    // What it held, such as locks on files, is free when it has left the namespace.
    let is_there = |pid: &Pid| fs::read_link(format!("/proc/{}/ns/net", pid.as_raw_nonzero())).is_ok();
    let begun = Instant::now();
    while begun.elapsed() < DEATH_MAX && killed.iter().any(is_there) {
        thread::sleep(DEATH_POLL);
    }
    Ok(killed.len())
}

fn ip(arguments: &[&str]) -> Result<String, LabError> {
    let mut command = Command::new("ip");
    command.args(arguments).stdin(Stdio::null());
    let output = command.output().trying(|| "starting `ip`".into())?;
    finish(&command, &output)
}

fn finish(command: &Command, output: &std::process::Output) -> Result<String, LabError> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let message = if said.is_empty() { output.status.to_string() } else { said };
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let command = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    Err(LabError::Command { command, message })
}
