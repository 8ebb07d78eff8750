//! `qwenkit serve`: models behind the interfaces that programs already speak.
//!
//! Contract: stdout says nothing; stderr says where the server listens. Not here: HTTP.

mod file;
mod tuning;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Arg, ArgAction, Args, ValueEnum, builder::FalseyValueParser};
use qwenkit_engine::Options;
use qwenkit_formats::Adapter as AdapterFile;
use qwenkit_hub::{ModelRef, Store, resolve};
use qwenkit_server::{
    AdapterSource, Chain, Config, ImageLimits, Job, Keys, Limits, LoadRefusal, Log, ModelSource, Quota, Server,
    TlsFiles, told_to_end, verify_audit_log,
};

use crate::opening::{self, PrefixCacheArgs, SessionArgs, SpeculateArg};
use crate::seeing::Sight;
use crate::terminal::note;
use crate::{air_gap, failure, locate};
use tuning::Tuning;

/// Arguments of `serve`. Each setting has a variable too.
#[derive(Args)]
#[command(
    mut_args(with_variable),
    after_help = "\
Examples:
  qwenkit serve                                        the default model on http://127.0.0.1:8080
  qwenkit serve qwen3:4b --port 9000
  qwenkit serve ./model.gguf --name support-bot
  qwenkit serve qwen3:4b --adapter legal=./legal --adapter sales=./sales.gguf     models `legal` and `sales` too
  qwenkit serve ./qwen3-vl                             images too, where the model has its tower in itself or beside it
  QWENKIT_API_KEY=secret qwenkit serve --host 0.0.0.0  for the whole network, with a key

Every setting has a variable (QWENKIT_MODEL, QWENKIT_MAX_WAITING for --max-waiting; several keys or origins stand behind commas)
and a place in the file of --config. What the command line says counts before what a variable says, and that before the file.

  curl http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' \\
       -d '{\"model\": \"default\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'"
)]
pub(crate) struct ServeArgs {
    /// The models: short names, hub ids, .gguf files or checkpoint folders; the first is the default
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    /// A further name that the first model answers to
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The first model's vision tower, where it has a file of its own [default: the mmproj*.gguf beside each model]
    #[arg(long, value_name = "FILE", conflicts_with = "text_only")]
    mmproj: Option<PathBuf>,
    /// Load no vision towers, to save memory; images are refused
    #[arg(long)]
    text_only: bool,
    /// A LoRA adapter of the first model, a PEFT folder or a GGUF file, served as a model of this name; may be given several times
    #[arg(long, value_name = "NAME=PATH", value_parser = adapter)]
    adapter: Vec<AdapterSource>,
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// The port; 0 for any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// A key that requests have to show; may be given several times
    #[arg(long, value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    api_key: Vec<String>,
    /// Requests that may wait for their turn; more are refused, to come again later
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    max_waiting: u32,
    /// Megabytes of a request's body at most
    #[arg(long, value_name = "MB", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_body_mb: u16,
    /// Images that a conversation may have
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(0..=10_000))]
    max_images: u16,
    /// Megabytes of an image's file at most
    #[arg(long, value_name = "MB", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_image_mb: u16,
    /// Millions of pixels of an image at most; models see less and scale it down
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=64))]
    max_image_megapixels: u16,
    /// Megabytes of memory that the images of all requests under way may take together
    #[arg(long, value_name = "MB", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_images_memory_mb: u32,
    /// Connections at once; more wait until one has ended
    #[arg(long, value_name = "N", default_value_t = 900, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    max_connections: u32,
    /// Seconds that a client may take to send a request's head, its body, or to take the next piece of an answer
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u16).range(1..))]
    client_timeout: u16,
    /// A line for each request on stderr: moment, id, key, path, status, milliseconds, tokens, and why the cache had not more
    #[arg(long, value_name = "FORM", value_enum, default_value_t = LogArg::Json)]
    log: LogArg,
    /// Shows in the log what is asked, too
    #[arg(long)]
    log_prompts: bool,
    /// A JSON file of keys with names, scopes and limits; see the README
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Requests that each --api-key may make in a minute
    #[arg(long, value_name = "N")]
    requests_per_minute: Option<u64>,
    /// Requests that each --api-key may make in a day
    #[arg(long, value_name = "N")]
    requests_per_day: Option<u64>,
    /// Tokens, of prompts and answers, that each --api-key may use in a minute
    #[arg(long, value_name = "N")]
    tokens_per_minute: Option<u64>,
    /// Tokens that each --api-key may use in a day
    #[arg(long, value_name = "N")]
    tokens_per_day: Option<u64>,
    /// An origin, as https://example.com, whose pages may ask; may be given several times, * for all
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    cors: Vec<String>,
    /// The server's certificate (PEM), to serve https; needs --tls-key
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Record each request in this file, every line bound to the one before by a hash
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Check that nobody has changed an audit log, and do not serve
    #[arg(long, value_name = "FILE")]
    verify_audit_log: Option<PathBuf>,
    /// A JSON file of settings by the names of these flags, which come before it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Threads of fine-tuning, which runs beside serving and gives way to it; 0 for none at all [default: half of --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    job_threads: Option<u16>,
    /// Where responses, files, batches and fine-tuned models are kept [default: a folder for each port under QWENKIT_HOME]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Load all models at the start, and keep them; else the first is loaded, and the others when they are asked for
    #[arg(long)]
    preload: bool,
    /// Check models and settings, and do not serve; neither the port nor the store is touched
    #[arg(long)]
    check: bool,
    /// Guesses next tokens and computes several at once; the answer is the same, sooner
    #[arg(long, value_name = "FROM", value_enum, default_value_t = SpeculateArg::Auto, help_heading = "How the model is run")]
    speculate: SpeculateArg,
    #[command(flatten)]
    prefix_cache: PrefixCacheArgs,
    #[command(flatten)]
    session: SessionArgs,
}

/// What is written of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogArg {
    /// A JSON object for each
    Json,
    /// Nothing
    Off,
}

/// Runs the command.
///
/// # Errors
/// When a model cannot be loaded or the address cannot be had.
pub(crate) fn run(args: &ServeArgs, offline: bool) -> anyhow::Result<()> {
    if let Some(path) = &args.verify_audit_log {
        let Chain { lines, head } = verify_audit_log(path)?;
        note(&format!(
            "{}: {lines} lines, each follows from the one before; the last one's hash is {head}\nhint: lines missing at the end show \
             only against a hash and a count that were noted elsewhere before",
            path.display()
        ));
        return Ok(());
    }
    match &args.config {
        Some(path) => {
            let (merged, network) = file::merged(path, std::env::args_os().collect())?;
            if network.air_gap {
                air_gap::lock()?;
            }
            serve(&merged, network.is_offline())
        }
        None => serve(args, offline),
    }
}

/// Gives a setting of `serve` its variable. What says what to do, and not how, has none.
fn with_variable(argument: Arg) -> Arg {
    let variable = match argument.get_long() {
        Some("check" | "verify-audit-log" | "help" | "version") => return argument,
        None => "QWENKIT_MODEL".to_owned(),
        Some("config") => "QWENKIT_SERVE_CONFIG".to_owned(),
        Some(name) => format!("QWENKIT_{}", name.replace('-', "_").to_uppercase()),
    };
    match argument.get_action() {
        ArgAction::SetTrue => argument.value_parser(FalseyValueParser::new()).env(variable),
        _ => argument.env(variable),
    }
}

fn serve(args: &ServeArgs, offline: bool) -> anyhow::Result<()> {
    let host = host(&args.host)?;
    if args.api_key.iter().any(|key| key.trim().is_empty()) {
        return Err(failure::usage(
            "an API key is empty\nhint: leave --api-key and QWENKIT_API_KEY out, or give a key",
        ));
    }
    let quota = Quota {
        requests_per_minute: args.requests_per_minute,
        requests_per_day: args.requests_per_day,
        tokens_per_minute: args.tokens_per_minute,
        tokens_per_day: args.tokens_per_day,
    };
    let mut keys = Keys::new(args.api_key.iter().map(|key| key.trim()), quota);
    if let Some(path) = &args.keys {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        keys.add_file(&text).with_context(|| path.display().to_string())?;
    }
    if keys.is_empty() && quota != Quota::default() {
        return Err(failure::usage("limits are for keys, and there is no key\nhint: give --api-key or --keys"));
    }
    let images = ImageLimits {
        count: usize::from(args.max_images),
        file_bytes: usize::from(args.max_image_mb) << 20,
        pixels: u64::from(args.max_image_megapixels) << 20,
        held_bytes: (args.max_images_memory_mb as usize) << 20,
    };
    let limits = Limits {
        body_bytes: usize::from(args.max_body_mb) << 20,
        images,
        connections: args.max_connections,
        patience: Duration::from_secs(u64::from(args.client_timeout)),
    };
    let log = match args.log {
        LogArg::Json => Some(Log::to(std::io::stderr(), args.log_prompts)?),
        LogArg::Off if args.log_prompts => {
            return Err(failure::usage("--log-prompts shows prompts in the log, and --log is off"));
        }
        LogArg::Off => None,
    };
    let store = match (&args.store, args.port) {
        (Some(folder), _) => Some(folder.clone()),
        // Nobody finds again what a server on any free port has kept.
        (None, 0) => None,
        (None, port) => Some(Store::open(None)?.root().with_file_name("server").join(port.to_string())),
    };
    let files = args.tls_cert.clone().zip(args.tls_key.clone());
    let tls = files.map(|(certificate, key)| TlsFiles { certificate, key });
    let (audit_log, origins) = (args.audit_log.clone(), args.cors.clone());
    let Loaded { models, paths } = load(args, offline)?;
    let threads = args.job_threads.map_or((args.session.threads() / 2).max(1), usize::from);
    let has_jobs = threads > 0 && store.is_some();
    let tune = Tuning { program: std::env::current_exe()?, models: paths, threads };
    let jobs: Vec<Arc<dyn Job>> = if has_jobs { vec![Arc::new(tune)] } else { Vec::new() };
    let jobs_told = match &store {
        _ if threads == 0 => "no fine-tuning (--job-threads is 0)".to_owned(),
        None => "no fine-tuning, as nothing is kept (--store)".to_owned(),
        Some(folder) => format!("fine-tuning with --job-threads {threads}, kept in {}", folder.display()),
    };
    let config = Config { host, port: args.port, limits, keys, store, jobs, audit_log, origins, log, tls };
    let names = models.iter().map(ModelSource::name).collect::<Vec<_>>().join(", ");
    if args.check {
        Server::check(&config)?;
        note(&format!("{names}: everything is in order; {jobs_told}"));
        return Ok(());
    }
    let server = Server::bind(&config, models)?;
    let address = server.address()?;
    let scheme = if args.tls_cert.is_some() { "https" } else { "http" };
    note(&format!("serving {names}\n  page  {scheme}://{address}\n  API   {scheme}://{address}/v1\nCtrl-C stops"));
    server.run(told_to_end());
    note("stopped");
    Ok(())
}

fn host(text: &str) -> anyhow::Result<IpAddr> {
    let text = if text == "localhost" { "127.0.0.1" } else { text };
    text.parse()
        .map_err(|_| failure::usage(format!("--host is {text:?}, expected an IP address such as 127.0.0.1 or 0.0.0.0")))
}

/// `NAME=PATH`
fn adapter(text: &str) -> Result<AdapterSource, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.trim().is_empty() && !path.is_empty() => {
            Ok(AdapterSource { name: name.trim().to_owned(), path: path.into() })
        }
        _ => Err("expected NAME=PATH, as in support=./adapters/support".to_owned()),
    }
}

/// What a model at a path is called: its file or folder, which may have dots in its name.
fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_string_lossy().into_owned();
    Some(name.strip_suffix(".gguf").map_or(name.clone(), str::to_owned))
}

/// The models, and where those of each name are.
struct Loaded {
    models: Vec<ModelSource>,
    paths: BTreeMap<String, PathBuf>,
}

/// The models: the first is loaded now, the others when they are asked for.
fn load(args: &ServeArgs, offline: bool) -> anyhow::Result<Loaded> {
    let wanted: Vec<Option<&str>> = match args.models.is_empty() {
        true => vec![None],
        false => args.models.iter().map(|name| Some(name.as_str())).collect(),
    };
    let mut names: Vec<String> = Vec::new();
    for adapter in &args.adapter {
        if names.contains(&adapter.name) || args.name.as_ref() == Some(&adapter.name) || adapter.name == "default" {
            return Err(failure::usage(format!(
                "two models have the name {}\nhint: name each adapter once",
                adapter.name
            )));
        }
        names.push(adapter.name.clone());
    }
    let (mut models, mut paths) = (Vec::new(), BTreeMap::new());
    for given in wanted {
        let located = locate::locate(given, offline)?;
        let name = match given {
            Some(given) => match resolve(given)? {
                ModelRef::Path(path) => name_of(&path).unwrap_or(given.to_owned()),
                _ => given.to_owned(),
            },
            None => located.stored.name.clone(),
        };
        if names.contains(&name) {
            return Err(failure::usage(format!("two models have the name {name}\nhint: name each file once")));
        }
        paths.insert(name.clone(), std::path::absolute(&located.stored.path)?);
        let options = args.session.options(args.max_waiting as usize, args.speculate)?;
        let options = Options { prefix_cache: args.prefix_cache.cache(), ..options };
        let is_first = models.is_empty();
        let sight = match (&args.mmproj, args.text_only) {
            (_, true) => Sight::Text,
            (Some(mmproj), false) if is_first => Sight::wanted(&located.files, Some(mmproj))?,
            _ => Sight::where_possible(&located.files),
        };
        let images = matches!(sight, Sight::Images(_));
        let open = move || opening::open_with(&located.files, &sight, &options);
        let aliases = args.name.iter().filter(|_| is_first).cloned().collect();
        let session = if is_first || args.preload || args.check { Some(open()?) } else { None };
        let adapters = if is_first { args.adapter.clone() } else { Vec::new() };
        if let Some(session) = &session {
            for adapter in &adapters {
                let read = || anyhow::Ok(session.adapter(&AdapterFile::open(&adapter.path)?).map(drop)?);
                read().map_err(|error| anyhow::anyhow!("--adapter {}: {error}", adapter.name))?;
            }
        }
        let source = match session {
            Some(session) if args.preload => ModelSource::loaded(name.clone(), aliases, session),
            session => ModelSource::on_demand(name.clone(), aliases, session, move || {
                open().map_err(|error| LoadRefusal {
                    needs_memory: matches!(error.downcast_ref(), Some(qwenkit_engine::Error::Memory { .. })),
                    message: format!("{error:#}"),
                })
            }),
        };
        models.push(source.with_images(images).with_adapters(adapters));
        names.push(name);
    }
    Ok(Loaded { models, paths })
}
