//! TLS: connections that have shaken hands, in front of the same router.
//!
//! Contract: a client that is slow with its handshake, or breaks it, keeps nobody else waiting.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use axum::serve::Listener;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, channel},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
    server::TlsStream,
};

/// A handshake may take so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that have shaken hands and wait to be served.
const READY_MAX: usize = 64;

/// Where the server's certificate is.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The certificate and those it follows from, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

impl TlsFiles {
    /// What they say.
    ///
    /// # Errors
    /// When a file cannot be read, holds no certificate or key, or the two do not belong together.
    pub(crate) fn acceptor(&self) -> io::Result<TlsAcceptor> {
        let wrong = |path: &PathBuf, what: &dyn std::fmt::Display| {
            let message = format!("{}: {what}; TLS wants a PEM certificate and its private key", path.display());
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect)
            .map_err(|error| wrong(&self.certificate, &error))?;
        if chain.is_empty() {
            return Err(wrong(&self.certificate, &"no certificate in it"));
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| wrong(&self.key, &error))?;
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|error| wrong(&self.certificate, &error))?;
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

/// A listener behind TLS.
pub(crate) struct TlsListener {
    ready: Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl TlsListener {
    /// Takes over a listener; needs a running runtime.
    pub(crate) fn new(listener: TcpListener, acceptor: TlsAcceptor) -> io::Result<TlsListener> {
        let address = listener.local_addr()?;
        let (sender, ready) = channel(READY_MAX);
        tokio::spawn(accept(listener, acceptor, sender));
        Ok(TlsListener { ready, address })
    }
}

/// Shakes hands with everybody at once, until nobody listens any more.
async fn accept(mut listener: TcpListener, acceptor: TlsAcceptor, ready: Sender<(TlsStream<TcpStream>, SocketAddr)>) {
    loop {
        let (stream, address) = tokio::select! {
            () = ready.closed() => return,
            accepted = Listener::accept(&mut listener) => accepted,
        };
        let (acceptor, ready) = (acceptor.clone(), ready.clone());
        tokio::spawn(async move {
            if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
                // Nobody listens any more: the connection closes.
                let _ = ready.send((stream, address)).await;
            }
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.ready.recv().await {
            Some(ready) => ready,
            // The task above ends only when this listener is gone.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}
