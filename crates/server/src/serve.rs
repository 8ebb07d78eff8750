//! The server's life: it binds, serves until it is told to stop, and lets running answers finish.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::{
    Job, Keys, Limits, Log,
    app::App,
    audit::{self, AuditLog},
    batches,
    connections::{self, Bounds},
    fine_tuning,
    models::ModelSource,
    origin::is_origin,
    responses,
    router::router,
    store::Store,
    tls::TlsFiles,
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
    /// Where a line for each request goes, if one is written.
    pub log: Option<Log>,
    /// Serves `https` with this certificate.
    pub tls: Option<TlsFiles>,
}

/// Loopback, any free port, no keys, nothing kept beyond the end of the server.
impl Default for Config {
    fn default() -> Config {
        Config {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            limits: Limits::default(),
            keys: Keys::default(),
            store: None,
            jobs: Vec::new(),
            audit_log: None,
            origins: Vec::new(),
            log: None,
            tls: None,
        }
    }
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

    /// Pages of what is no origin.
    #[error(
        "`--cors` has {found:?}, expected an origin as browsers send it, scheme, host and perhaps port without a path, such as \
         https://shop.example, or * for all"
    )]
    Origin {
        /// What was found.
        found: String,
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
        let tls = checked(config)?;
        let bound = runtime.block_on(TcpListener::bind(address));
        let listener = bound.map_err(|reason| Error::Bind { address, reason })?;
        let store = Store::open(config.store.as_deref())?;
        let audit = config.audit_log.as_deref().map(AuditLog::open).transpose()?;
        let app = Arc::new(App::new(models, config, audit, store));
        responses::end_those_left(&app).map_err(|error| io::Error::other(error.message))?;
        fine_tuning::restore(&app).map_err(|error| io::Error::other(error.message))?;
        Ok(Server { runtime, listener, tls, app })
    }

    /// Looks at everything that `bind` would refuse, and takes neither the address nor the store: another server may have them.
    ///
    /// # Errors
    /// As `bind`, and when the audit log is broken.
    pub fn check(config: &Config) -> Result<(), Error> {
        checked(config)?;
        match config.audit_log.as_deref().filter(|path| path.exists()) {
            Some(path) => Ok(audit::verify(path).map(drop)?),
            None => Ok(()),
        }
    }

    /// The address in force.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn address(&self) -> Result<SocketAddr, Error> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until `stop`; then new requests are refused and running answers finish, for a while.
    pub fn run(self, stop: impl Future<Output = ()> + Send + 'static) {
        let Server { runtime, listener, tls, app } = self;
        let log = app.log.clone();
        runtime.block_on(serve(listener, tls, app, stop));
        // Answers beyond their grace end with the engine; what is being kept gets kept.
        runtime.shutdown_timeout(KEEPING);
        if let Some(log) = log {
            log.flush();
        }
    }
}

/// Refuses what makes no sense or is not safe; returns what TLS is made of, if it is wanted.
fn checked(config: &Config) -> Result<Option<TlsAcceptor>, Error> {
    if config.keys.is_empty() && !config.host.is_loopback() {
        return Err(Error::OpenToAll { address: SocketAddr::new(config.host, config.port) });
    }
    if let Some(found) = config.origins.iter().find(|origin| !is_origin(origin)) {
        return Err(Error::Origin { found: found.clone() });
    }
    Ok(config.tls.as_ref().map(TlsFiles::acceptor).transpose()?)
}

async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, app: Arc<App>, stop: impl Future<Output = ()>) {
    let (told, stopping) = tokio::sync::watch::channel(false);
    tokio::spawn(batches::work(Arc::clone(&app)));
    tokio::spawn(fine_tuning::work(Arc::clone(&app)));
    let bounds = Bounds { count: app.limits.connections, patience: app.limits.patience };
    let server = connections::serve(listener, tls, router(&app), bounds, stopping);
    tokio::pin!(server);
    tokio::select! {
        () = &mut server => return,
        () = stop => {}
    }
    app.stop();
    let _ = told.send(true);
    // Those that take longer have had their time.
    let _ = tokio::time::timeout(GRACE, server).await;
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
