//! `murmur-lab topology.toml`: starts the hosts of a topology, runs what it names on them, and changes the network as it is told
//! on standard input, until all programs have ended or someone ends it.

#[cfg(target_os = "linux")]
mod control;
#[cfg(target_os = "linux")]
mod session;

#[cfg(target_os = "linux")]
fn main() -> anyhow::Result<std::process::ExitCode> {
    session::main()
}

#[cfg(not(target_os = "linux"))]
fn main() -> anyhow::Result<()> {
    anyhow::bail!("labs are made of network namespaces and TUN devices, which only Linux has")
}
