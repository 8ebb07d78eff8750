//! Runs jobs, one after the other in the order in which they came.
//!
//! Contract: a job that a server leaves unfinished, however it ends, is gone on with by the next one. Nobody's data stay on disk
//! longer than the job needs them.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use serde_json::{Value, json};

use super::{
    content,
    record::{self, Pace, TRAINING, VALIDATION, text},
};
use crate::{
    AdapterSource,
    adapters::adapted,
    app::App,
    error::ApiError,
    files,
    jobs::{Done, Job, JobError, Order, Progress, Wish},
    keys::Caller,
    store::JOBS,
    text::blocking,
};

/// A job that was stopped by somebody else, or a store that fails, is tried again after so long.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs what there is, and waits for more, until the server stops.
pub(crate) async fn work(app: Arc<App>) {
    let Ok((job, _)) = app.tuning() else { return };
    let job = Arc::clone(job);
    while !app.is_stopping() {
        let (kept, work) = (Arc::clone(&app), Arc::clone(&job));
        let result = blocking(move || match next(&kept)? {
            Some(id) => {
                let result = one(&kept, &*work, &id);
                kept.set_running_job(None);
                kept.tuned.rest();
                result.map(|is_over| if is_over { Next::AtOnce } else { Next::Later })
            }
            None => Ok(Next::WhenTold),
        });
        match result.await {
            Ok(Next::AtOnce) => {}
            Ok(Next::WhenTold) => app.job_work.notified().await,
            Ok(Next::Later) => tokio::time::sleep(PAUSE).await,
            Err(error) => {
                app.warn(&format!("fine-tuning: {}", error.message));
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// When to look for a job again.
enum Next {
    AtOnce,
    Later,
    WhenTold,
}

/// The job whose turn it is: one that was cut off, or the oldest that waits. It counts as running from here on.
fn next(app: &App) -> Result<Option<String>, ApiError> {
    // One whose model is not served waits for a server that does.
    let is_served = |job: &Value| app.models.slots().iter().any(|slot| slot.name == record::base(job));
    let rank = |job: &Value| match job["status"].as_str() {
        _ if !is_served(job) => None,
        Some("running" | "validating_files") => Some(0),
        Some("queued") => Some(1),
        _ => None,
    };
    let jobs = app.store.all(JOBS)?;
    let ranked = jobs.iter().filter_map(|job| Some(((rank(job)?, record::order(job)), job)));
    let Some((_, job)) = ranked.min_by_key(|(rank, _)| *rank) else { return Ok(None) };
    let id = text(job, "id");
    app.set_running_job(Some(id.clone()));
    Ok(Some(id))
}

/// Runs a job. Returns whether it came to an end, or was told to wait.
fn one(app: &Arc<App>, work: &dyn Job, id: &str) -> Result<bool, ApiError> {
    let mut is_wanted = false;
    let job = record::change(app, id, |job, _| {
        // Somebody may have cancelled it meanwhile.
        is_wanted = ["queued", "validating_files", "running"].contains(&text(job, "status").as_str());
        if is_wanted {
            job["status"] = json!("validating_files");
        }
        Ok(())
    })?;
    if !is_wanted {
        return Ok(true);
    }
    let folder = app.tuning()?.1.join(id);
    let result = match lay_out(app, &job, &folder)? {
        Err(message) => Err(JobError::Failed { message }),
        Ok(()) => {
            let settings = record::settings(&job);
            let order = Order { folder: folder.clone(), model: record::base(&job), settings };
            let mut pace = Pace::default();
            work.run(&order, &mut |told| hear(app, id, told, &mut pace))
        }
    };
    match result {
        Ok(done) => finish(app, id, &folder, &done)?,
        Err(JobError::Failed { message }) => {
            clear(app, id);
            record::change(app, id, |job, edit| {
                if !record::is_over(job) {
                    record::fail(job, edit, &message);
                }
                Ok(())
            })?;
        }
        Err(JobError::Stopped) => {
            let job = app.store.get(JOBS, id)?.unwrap_or_default();
            if record::is_over(&job) {
                clear(app, id);
            }
            return Ok(record::is_over(&job) || job["status"] == "paused");
        }
    }
    Ok(true)
}

/// The job's folder with the files that it learns from; what is missing, in words.
fn lay_out(app: &App, job: &Value, folder: &Path) -> Result<Result<(), String>, ApiError> {
    let failed = |error: io::Error| ApiError::internal(format!("{}: {error}", folder.display()));
    fs::create_dir_all(folder).map_err(failed)?;
    for (key, name) in [("training_file", TRAINING), ("validation_file", VALIDATION)] {
        let path = folder.join(name);
        if job[key].is_null() || path.exists() {
            continue;
        }
        let Some(content) = content(app, &text(job, key))? else {
            return Ok(Err(format!("the file of `{key}`, {}, was deleted before the job began", text(job, key))));
        };
        // Whole, or not there.
        let half = folder.join(format!("{name}.part"));
        fs::write(&half, content).and_then(|()| fs::rename(&half, &path)).map_err(failed)?;
    }
    Ok(Ok(()))
}

/// Takes in what a job tells, and says what is wished of it.
fn hear(app: &App, id: &str, told: &[Progress], pace: &mut Pace) -> Wish {
    let job = match told {
        [] => app.store.get(JOBS, id).map(Option::unwrap_or_default),
        told => {
            let changed = record::change(app, id, |job, edit| {
                let is_wanted = !record::is_over(job) && job["status"] != "paused";
                told.iter().filter(|_| is_wanted).for_each(|progress| record::note(job, edit, progress, pace));
                Ok(())
            });
            // What could not be kept is told again, and counted then.
            let done = pace.take();
            changed.inspect(|_| app.tuned.add(done, pace))
        }
    };
    match job {
        _ if app.is_stopping() => Wish::Rest,
        Ok(job) if job["status"] == "paused" => Wish::Rest,
        Ok(job) if record::is_over(&job) => Wish::Cancel,
        Ok(_) => Wish::GoOn,
        // What cannot be kept now is told again later.
        Err(error) => {
            app.warn(&format!("fine-tuning: {}", error.message));
            Wish::Rest
        }
    }
}

/// Gives what a job has made a name.
fn finish(app: &App, id: &str, folder: &Path, done: &Done) -> Result<(), ApiError> {
    let job = app.store.get(JOBS, id)?.unwrap_or_default();
    let base = record::base(&job);
    let slot = Arc::clone(app.models.slot(Some(&base))?);
    let name = name(app, &job, &base);
    let source = AdapterSource { name: name.clone(), path: done.adapter.clone() };
    let inside = done.adapter.strip_prefix(folder).ok().and_then(Path::to_str).map(str::to_owned);
    let adapter = inside.ok_or_else(|| ApiError::internal("the adapter is not in the job's folder"))?;
    let figures = record::figures(&app.store.events(id)?);
    let owner = Caller::of_owner(&text(&job, "owner"));
    let file = files::object(app, &owner, "step_metrics.csv", "fine-tune-results", figures.len());
    // Read before anybody is told of it, if its model is there.
    let loaded = slot.model().map(|model| adapted(&model, &source)).transpose();
    for file in [TRAINING, VALIDATION] {
        let _ = fs::remove_file(folder.join(file));
    }
    let problem = match loaded {
        Ok(model) => {
            // Whoever reads that the job has succeeded can ask the model.
            app.models.add_adapter(&slot, source, model);
            None
        }
        Err(error) => Some(format!("the adapter cannot be used: {error}")),
    };
    let mut is_made = false;
    record::change(app, id, |job, edit| {
        // A job that was paused at its very end is done all the same.
        if record::is_over(job) {
            return Ok(());
        }
        if let Some(problem) = &problem {
            record::fail(job, edit, problem);
            return Ok(());
        }
        app.store.put_file(&text(&file, "id"), &file, figures.as_bytes())?;
        job["result_files"] = json!([file["id"]]);
        record::succeed(job, edit, &name, &adapter);
        is_made = true;
        Ok(())
    })?;
    if !is_made {
        slot.adapters.remove(&name);
        clear(app, id);
    }
    Ok(())
}

/// `ft:BASE:SUFFIX:ID`, as OpenAI's are.
fn name(app: &App, job: &Value, base: &str) -> String {
    let id = text(job, "id").replace("ftjob-", "");
    let named = |id: &str| format!("ft:{base}:{}:{id}", text(job, "user_provided_suffix"));
    let short = named(id.get(..8).unwrap_or(&id));
    if app.models.has_name(&short) { named(&id) } else { short }
}

/// Removes a job's folder.
pub(super) fn clear(app: &App, id: &str) {
    let Some(folder) = app.job_folders() else { return };
    match fs::remove_dir_all(folder.join(id)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            app.warn(&format!("{} cannot be removed: {error}", folder.join(id).display()));
        }
        _ => {}
    }
}
