//! Sockets: accepting, limits per connection, shutdown.
//!
//! HTTP/1.1 only: nothing here gains from HTTP/2, and its frames would be one more thing to bound. The loop is our own
//! because `axum::serve` has neither header timeouts nor a limit on connections.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::Request};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use crate::{
    ApiOptions, Backend, OptionsError,
    limits::{
        ACCEPT_RETRY_DELAY, FAREWELL, HEADER_READ_TIMEOUT, MAX_CONNECTIONS, MAX_HEADER_BYTES, MAX_HEADERS,
        WRITE_STALL_TIMEOUT,
    },
    metrics::Metrics,
    router::routes,
    stall::StallGuard,
    state::AppState,
};

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The options do not suit the address.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The listener has no address.
    #[error("the listening socket has no address: {0}")]
    Listener(#[from] io::Error),
}

/// Serves until `shutdown` ends; then accepts nothing more, lets running answers finish for
/// [`ApiOptions::shutdown_grace`], and cuts off the rest: each of them ends with an error. Errors of clients and of `accept`
/// never end it.
pub async fn serve(
    listener: TcpListener,
    backend: Arc<dyn Backend>,
    options: ApiOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    options.validate(listener.local_addr()?)?;
    let state = Arc::new(AppState::new(backend.clone(), &options));
    let server = Server { metrics: state.metrics.clone(), routes: routes(state), grace: options.shutdown_grace };
    server.run(&listener, shutdown, || backend.cut_off()).await;
    Ok(())
}

/// Where connections come from; tests have one that fails.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, SocketAddr)>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Tokens are small and each is wanted at once.
        stream.set_nodelay(true)?;
        Ok((stream, peer))
    }
}

struct Server {
    routes: Router,
    metrics: Arc<Metrics>,
    grace: Duration,
}

impl Server {
    async fn run(self, listener: &impl Accept, shutdown: impl Future<Output = ()>, cut_off: impl FnOnce()) {
        let (stop, stopping) = watch::channel(false);
        let mut connections = JoinSet::new();
        tokio::select! {
            () = shutdown => {}
            () = self.accept_all(listener, &mut connections, &stopping) => {}
        }
        let _ = stop.send(true);
        if timeout(self.grace, all_ended(&mut connections)).await.is_err() {
            tracing::warn!(connections = connections.len(), "cutting off answers that did not finish in time");
            cut_off();
            // Each is told so; a client that does not listen is not waited for.
            let _ = timeout(FAREWELL, all_ended(&mut connections)).await;
            connections.shutdown().await;
        }
    }

    /// Never returns.
    async fn accept_all(
        &self,
        listener: &impl Accept,
        connections: &mut JoinSet<()>,
        stopping: &watch::Receiver<bool>,
    ) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = serve_connection(stream, self.routes.clone(), stopping.clone());
                    let gauge = self.metrics.connection();
                    connections.spawn(async move {
                        let _held = (slot, gauge);
                        connection.await;
                    });
                }
                // The client gave up before it was accepted, or there are no file descriptors left: the listener
                // itself is as good as before.
                Err(error) => {
                    self.metrics.accept_error();
                    tracing::warn!(%error, "cannot accept a connection; trying again");
                    sleep(ACCEPT_RETRY_DELAY).await;
                }
            }
        }
    }
}

async fn all_ended(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

async fn serve_connection<S>(stream: S, routes: Router, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service =
        TowerToHyperService::new(routes.map_request(|request: Request<Incoming>| request.map(axum::body::Body::new)));
    let io = TokioIo::new(StallGuard::new(stream, WRITE_STALL_TIMEOUT));
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEADER_BYTES);
    let mut connection = std::pin::pin!(builder.serve_connection(io, service));
    let finished = tokio::select! {
        result = connection.as_mut() => Some(result),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let result = match finished {
        Some(result) => result,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // A client's doing: it left, or sent no HTTP.
        tracing::debug!(%error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        sync::{mpsc, oneshot},
    };

    use super::*;

    /// Fails as often as it is told to before every connection.
    struct Flaky {
        failures: Mutex<u32>,
        incoming: tokio::sync::Mutex<mpsc::Receiver<DuplexStream>>,
    }

    impl Accept for Flaky {
        type Stream = DuplexStream;

        async fn accept(&self) -> io::Result<(DuplexStream, SocketAddr)> {
            {
                let mut failures = self.failures.lock().unwrap();
                if *failures > 0 {
                    *failures -= 1;
                    const EMFILE: i32 = 24;
                    return Err(io::Error::from_raw_os_error(EMFILE));
                }
            }
            match self.incoming.lock().await.recv().await {
                Some(stream) => Ok((stream, ([127, 0, 0, 1], 1).into())),
                None => std::future::pending().await,
            }
        }
    }

    fn server(routes: Router) -> Server {
        Server { routes, metrics: Arc::default(), grace: Duration::from_secs(5) }
    }

    fn flaky(failures: u32) -> (Flaky, mpsc::Sender<DuplexStream>) {
        let (sender, receiver) = mpsc::channel(8);
        (Flaky { failures: Mutex::new(failures), incoming: tokio::sync::Mutex::new(receiver) }, sender)
    }

    async fn ask(client: &mut DuplexStream) -> String {
        client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test(start_paused = true)]
    async fn failing_to_accept_does_not_end_the_listener() {
        let (listener, connect) = flaky(10);
        let server = server(Router::new().route("/", get(|| async { "here" })));
        let metrics = server.metrics.clone();
        let client = async {
            let (mut client, stream) = duplex(4096);
            connect.send(stream).await.unwrap();
            assert!(ask(&mut client).await.ends_with("here"));
        };
        server.run(&listener, client, || ()).await;
        assert!(metrics.render().contains("murmur_http_accept_errors_total 10"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_running_answer_is_finished_before_the_server_stops() {
        let (listener, connect) = flaky(0);
        let (asked, was_asked) = oneshot::channel::<()>();
        let (finish, may_finish) = oneshot::channel::<()>();
        let gates = Arc::new(Mutex::new(Some((asked, may_finish))));
        let routes = Router::new().route(
            "/",
            get(move || async move {
                let (asked, may_finish) = gates.lock().unwrap().take().unwrap();
                asked.send(()).unwrap();
                may_finish.await.unwrap();
                "finished"
            }),
        );
        let (mut client, stream) = duplex(4096);
        connect.send(stream).await.unwrap();
        let asking = tokio::spawn(async move { ask(&mut client).await });
        let shutdown = async {
            was_asked.await.unwrap();
            tokio::spawn(async move {
                sleep(Duration::from_secs(1)).await;
                finish.send(()).unwrap();
            });
        };
        server(routes).run(&listener, shutdown, || ()).await;
        assert!(asking.await.unwrap().ends_with("finished"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_finish_is_cut_off_after_the_grace_period() {
        let (listener, connect) = flaky(0);
        let (asked, was_asked) = oneshot::channel::<()>();
        let asked = Arc::new(Mutex::new(Some(asked)));
        let routes = Router::new().route(
            "/",
            get(move || async move {
                asked.lock().unwrap().take().unwrap().send(()).unwrap();
                std::future::pending::<()>().await;
            }),
        );
        let (mut client, stream) = duplex(4096);
        connect.send(stream).await.unwrap();
        let asking = tokio::spawn(async move { ask(&mut client).await });
        server(routes).run(&listener, async { was_asked.await.unwrap() }, || ()).await;
        assert_eq!(asking.await.unwrap(), "");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_finishes_its_headers_is_disconnected() {
        let (listener, connect) = flaky(0);
        let client = async {
            let (mut client, stream) = duplex(4096);
            connect.send(stream).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost: loc").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
        };
        timeout(2 * HEADER_READ_TIMEOUT, server(Router::new()).run(&listener, client, || ())).await.unwrap();
    }
}
