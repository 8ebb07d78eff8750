//! `qwenkit list`: the models in the store, or every short name.

use clap::Args;
use qwenkit_hub::{CatalogueEntry, ModelRef, Store, StoredModel, bytes_in_words, catalogue};
use serde_json::{Value, json};

use crate::terminal;

/// Arguments of `list`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  qwenkit list
  qwenkit list --all
  qwenkit list --json")]
pub(crate) struct ListArgs {
    /// Every model with a short name, fetched or not
    #[arg(long)]
    all: bool,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub(crate) fn run(args: &ListArgs) -> anyhow::Result<()> {
    let store = Store::open(None)?;
    match (args.all, args.json) {
        (true, true) => terminal::print_json(&catalogue().iter().map(|entry| entry_json(&store, entry)).collect()),
        (true, false) => terminal::print(&catalogue_table(&store)),
        (false, true) => terminal::print_json(&store.list().iter().map(stored_json).collect()),
        (false, false) => list_stored(&store),
    }
}

fn list_stored(store: &Store) -> anyhow::Result<()> {
    let models = store.list();
    if models.is_empty() {
        terminal::note(&format!(
            "the store `{}` is empty; `qwenkit pull MODEL` fetches a model",
            store.root().display()
        ));
        return Ok(());
    }
    let row =
        |m: &StoredModel| vec![m.name.clone(), bytes_in_words(m.size_bytes), licence(m), m.path.display().to_string()];
    let rows: Vec<_> =
        [heads(&["NAME", "SIZE", "LICENCE", "PATH"])].into_iter().chain(models.iter().map(row)).collect();
    terminal::print(&terminal::table(&rows))
}

fn catalogue_table(store: &Store) -> String {
    let row = |entry: &'static CatalogueEntry| {
        let size = entry.size_bytes.map(bytes_in_words).unwrap_or_default();
        let here = if store.find(&ModelRef::Catalogue(entry)).is_some() { "yes" } else { "" };
        [entry.name, entry.parameters, entry.quantisation, &size, entry.licence, here].map(str::to_owned).to_vec()
    };
    let first = heads(&["NAME", "PARAMETERS", "TYPE", "SIZE", "LICENCE", "HERE"]);
    terminal::table(&[first].into_iter().chain(catalogue().iter().map(row)).collect::<Vec<_>>())
}

fn heads(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn licence(model: &StoredModel) -> String {
    model.licence.clone().unwrap_or_else(|| "unknown".to_owned())
}

/// A model of the store as JSON.
pub(crate) fn stored_json(model: &StoredModel) -> Value {
    json!({
        "name": model.name,
        "path": model.path,
        "size_bytes": model.size_bytes,
        "licence": model.licence,
        "repository": model.repository,
        "sha256": model.sha256,
        "pulled_unix_s": model.pulled_unix_s,
        "source": model.source,
    })
}

fn entry_json(store: &Store, entry: &'static CatalogueEntry) -> Value {
    json!({
        "name": entry.name,
        "title": entry.title,
        "repository": entry.repository,
        "file": entry.file,
        "parameters": entry.parameters,
        "quantisation": entry.quantisation,
        "size_bytes": entry.size_bytes,
        "licence": entry.licence,
        "licence_url": entry.licence_url,
        "here": store.find(&ModelRef::Catalogue(entry)).is_some(),
    })
}
