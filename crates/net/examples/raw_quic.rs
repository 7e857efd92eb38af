//! A file over QUIC and nothing around it: what `./x bench fetch` compares model files from nodes with.
//!
//! `raw_quic send FILE ADDRESS` waits at that address and port of its own choice, says `ID ADDRESS:PORT`, and sends the file to whoever connects.
//! `raw_quic take ID ADDRESS:PORT` says how many seconds it takes to have it.
#![allow(clippy::print_stdout)] // a tool for its developers

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use iroh::endpoint::presets;
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode, TransportAddr};
use tokio::io::{AsyncWriteExt, BufReader};

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

const ALPN: &[u8] = b"murmur/raw/1";
/// Bytes that are read and sent at once.
const PIECE: usize = 1 << 20;

#[tokio::main]
async fn main() -> Outcome {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["send", file, address] => send(PathBuf::from(file), address.parse()?).await,
        ["take", id, address] => take(id.parse()?, address.parse()?).await,
        _ => Err("usage: raw_quic send FILE ADDRESS | take ID ADDRESS:PORT".into()),
    }
}

async fn bind(address: Option<IpAddr>) -> Result<Endpoint, Box<dyn std::error::Error + Send + Sync>> {
    let mut builder = Endpoint::builder(presets::Minimal).relay_mode(RelayMode::Disabled).alpns(vec![ALPN.to_vec()]);
    if let Some(address) = address {
        builder = builder.clear_ip_transports().bind_addr(SocketAddr::new(address, 0))?;
    }
    Ok(builder.bind().await?)
}

async fn send(file: PathBuf, address: IpAddr) -> Outcome {
    let endpoint = bind(Some(address)).await?;
    for socket in endpoint.bound_sockets() {
        println!("{} {socket}", endpoint.id());
    }
    while let Some(incoming) = endpoint.accept().await {
        // Whoever goes away has what it wants.
        let _ = send_to(incoming, &file).await;
    }
    Ok(())
}

async fn send_to(incoming: iroh::endpoint::Incoming, file: &Path) -> Outcome {
    let connection = incoming.await?;
    let mut stream = connection.open_uni().await?;
    let mut file = BufReader::with_capacity(PIECE, tokio::fs::File::open(file).await?);
    tokio::io::copy_buf(&mut file, &mut stream).await?;
    stream.shutdown().await?;
    connection.closed().await;
    Ok(())
}

async fn take(id: EndpointId, address: SocketAddr) -> Outcome {
    let endpoint = bind(None).await?;
    let begun = Instant::now();
    let connection = endpoint.connect(EndpointAddr::from_parts(id, [TransportAddr::Ip(address)]), ALPN).await?;
    let mut stream = connection.accept_uni().await?;
    while stream.read_chunk(PIECE).await?.is_some() {}
    println!("{}", begun.elapsed().as_secs_f64());
    connection.close(0u32.into(), b"done");
    endpoint.close().await;
    Ok(())
}
