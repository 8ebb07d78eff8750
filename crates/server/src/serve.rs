//! The server's life: it binds, serves until it is told to stop, and lets running answers finish.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use axum::serve::Listener;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::{
    Job, Keys, Limits,
    app::App,
    audit::AuditLog,
    batches, fine_tuning,
    models::ModelSource,
    responses,
    router::router,
    store::Store,
    tls::{TlsFiles, TlsListener},
};

/// Running answers may take so long after the server was told to stop.
const GRACE: Duration = Duration::from_secs(60);

/// What is on its way into the store may take so long.
const KEEPING: Duration = Duration::from_secs(10);

/// Where and how to serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// The address to listen on.
    pub host: IpAddr,
    /// The port; 0 for any that is free.
    pub port: u16,
    /// What requests may ask for.
    pub limits: Limits,
    /// Who may ask.
    pub keys: Keys,
    /// Where responses, files, batches and jobs are kept; where absent, until the end of the server, and there are no jobs.
    pub store: Option<PathBuf>,
    /// What can be done beside serving: `tune` makes adapters, at `/v1/fine_tuning/jobs`.
    pub jobs: Vec<Arc<dyn Job>>,
    /// Where requests are recorded, if they are.
    pub audit_log: Option<PathBuf>,
    /// Origins, as `https://example.com`, whose pages may ask; `*` for all.
    pub origins: Vec<String>,
    /// Serves `https` with this certificate.
    pub tls: Option<TlsFiles>,
}

/// Why a server does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port is taken, or the address is not this machine's.
    #[error("cannot listen on {address}: {reason}; `--port` takes another port, 0 for any that is free")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// The system's words.
        reason: io::Error,
    },

    /// An address that others reach, and nothing that keeps strangers out.
    #[error(
        "{address} can be reached from other machines, and there is no API key; give one (`--api-key`, or QWENKIT_API_KEY), or listen on 127.0.0.1"
    )]
    OpenToAll {
        /// Where.
        address: SocketAddr,
    },

    /// The runtime could not be started, or a socket failed.
    #[error("the server stopped: {0}")]
    Io(#[from] io::Error),
}

/// A server that has bound its address and serves nobody yet.
pub struct Server {
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    app: Arc<App>,
}

impl Server {
    /// Binds the address. The first of `models`, of which there is at least one, is the default.
    ///
    /// # Errors
    /// When the address cannot be had, or may be reached by strangers and there is no key.
    pub fn bind(config: &Config, models: Vec<ModelSource>) -> Result<Server, Error> {
        // Connections cost little; the engine needs the cores.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let address = SocketAddr::new(config.host, config.port);
        if config.keys.is_empty() && !config.host.is_loopback() {
            return Err(Error::OpenToAll { address });
        }
        let bound = runtime.block_on(TcpListener::bind(address));
        let listener = bound.map_err(|reason| Error::Bind { address, reason })?;
        let store = Store::open(config.store.as_deref())?;
        let audit = config.audit_log.as_deref().map(AuditLog::open).transpose()?;
        let app = Arc::new(App::new(models, config, audit, store));
        responses::end_those_left(&app).map_err(|error| io::Error::other(error.message))?;
        fine_tuning::restore(&app).map_err(|error| io::Error::other(error.message))?;
        let tls = config.tls.as_ref().map(TlsFiles::acceptor).transpose()?;
        Ok(Server { runtime, listener, tls, app })
    }

    /// The address in force.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn address(&self) -> Result<SocketAddr, Error> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until `stop`; then new requests are refused and running answers finish, for a while.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn run(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), Error> {
        let Server { runtime, listener, tls, app } = self;
        let result = runtime.block_on(async move {
            match tls {
                Some(acceptor) => serve(TlsListener::new(listener, acceptor)?, app, stop).await,
                None => serve(listener, app, stop).await,
            }
        });
        // Answers beyond their grace end with the engine; what is being kept gets kept.
        runtime.shutdown_timeout(KEEPING);
        Ok(result?)
    }
}

async fn serve<L>(listener: L, app: Arc<App>, stop: impl Future<Output = ()> + Send + 'static) -> io::Result<()>
where
    L: Listener,
    L::Addr: fmt::Debug,
{
    let (told, mut stopping) = tokio::sync::watch::channel(false);
    let until = async move {
        // The sender lives as long as the server.
        let _ = stopping.wait_for(|told| *told).await;
    };
    tokio::spawn(batches::work(Arc::clone(&app)));
    tokio::spawn(fine_tuning::work(Arc::clone(&app)));
    let server = axum::serve(listener, router(&app)).with_graceful_shutdown(until).into_future();
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return ended,
        () = stop => {}
    }
    app.stop();
    let _ = told.send(true);
    match tokio::time::timeout(GRACE, server).await {
        Ok(ended) => ended,
        Err(_) => Ok(()),
    }
}

/// Comes when the process is told to end: Ctrl-C, or a supervisor's TERM.
pub async fn told_to_end() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    {
        let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
        match terminate {
            Ok(mut terminate) => {
                tokio::select! {
                    () = interrupt => {}
                    _ = terminate.recv() => {}
                }
            }
            Err(_) => interrupt.await,
        }
    }
    #[cfg(not(unix))]
    interrupt.await;
}
