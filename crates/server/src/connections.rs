//! Connections: so many at once, each with a handshake, heads, bodies and reading that come in time.
//!
//! Contract: a client that is slow, or goes nowhere, loses its connection and keeps nobody else waiting. Beyond the most that
//! may be there, new ones wait with the system until one has ended.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{Sleep, sleep},
};
use tokio_rustls::TlsAcceptor;

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// How many at once.
    pub(crate) count: u32,
    /// How long for a handshake, for the head of a request, for taking a piece of an answer.
    pub(crate) patience: Duration,
}

/// Serves whoever connects until `stopping` says so; then waits for the answers under way.
pub(crate) async fn serve(
    mut listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    bounds: Bounds,
    stopping: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(bounds.count as usize));
    let mut told = stopping.clone();
    // The sender lives as long as the server.
    let stop = async move { drop(told.wait_for(|told| *told).await) };
    tokio::pin!(stop);
    loop {
        let accepted = async {
            let place = Arc::clone(&room).acquire_owned().await;
            (place, Listener::accept(&mut listener).await.0)
        };
        let (place, stream) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut stop => break,
        };
        let (tls, router, stopping) = (tls.clone(), router.clone(), stopping.clone());
        // A token is a small write that somebody waits for.
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            match tls {
                None => exchange(stream, router, bounds.patience, stopping).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = tokio::time::timeout(bounds.patience, tls.accept(stream)).await {
                        exchange(stream, router, bounds.patience, stopping).await;
                    }
                }
            }
            drop(place);
        });
    }
    drop(listener);
    // Nobody closes the semaphore, so this waits until every place is free again.
    let _ = room.acquire_many(bounds.count).await;
}

/// One connection's requests, one after the other.
async fn exchange<S>(stream: S, router: Router, patience: Duration, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = TokioIo::new(Patient { stream, patience, stuck: None });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .serve_connection(stream, TowerToHyperService::new(router));
    tokio::pin!(connection);
    // What ends a connection early is its client's affair, who does not hear of it any more.
    tokio::select! {
        _ = &mut connection => return,
        _ = stopping.wait_for(|told| *told) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}

/// A stream whose other end has to take what is written.
struct Patient<S> {
    stream: S,
    patience: Duration,
    /// Rings when nothing was taken for too long; while something waits to be taken.
    stuck: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    fn in_time<T>(&mut self, context: &mut Context<'_>, found: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if found.is_ready() {
            self.stuck = None;
            return found;
        }
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        match stuck.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let found = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.in_time(context, found)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let found = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.in_time(context, found)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let found = Pin::new(&mut self.stream).poll_flush(context);
        self.in_time(context, found)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let found = Pin::new(&mut self.stream).poll_shutdown(context);
        self.in_time(context, found)
    }
}
