//! `/v1/fine_tuning/jobs`: adapters made of people's files beside serving, one job at a time, through crashes and restarts.
//!
//! Contract: a job's object, its events and its state are kept before anybody is told of them; what it has made is a model by
//! a name of its own, in this server and the next. Not here: the training, which is a `Job` of whoever runs the server.

mod record;
mod request;
mod standing;
mod worker;

pub(crate) use standing::{Standing, Tuned, standing};
pub(crate) use worker::work;

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
    http::StatusCode,
};
use serde_json::{Value, json};

use crate::{
    AdapterSource, Job,
    app::{App, unix_s},
    error::ApiError,
    files,
    keys::Caller,
    listing::{Page, all_own, own, window},
    models::Slot,
    store::{FILES, JOBS},
    text::blocking,
};
use record::{Edit, Level, is_over, shown, text};

/// The job that makes adapters.
const JOB: &str = "tune";
/// Jobs that have not come to their end, of all callers together.
const JOBS_MAX: usize = 64;

impl App {
    /// The job that makes adapters, and where such jobs have their folders.
    ///
    /// # Errors
    /// When this server has none, or keeps nothing.
    pub(crate) fn tuning(&self) -> Result<(&Arc<dyn Job>, PathBuf), ApiError> {
        let missing = |message: &str| {
            let error = ApiError::new(StatusCode::NOT_IMPLEMENTED, "invalid_request_error", message);
            Err(error.with_code("unsupported"))
        };
        let Some(job) = self.jobs.iter().find(|job| job.name() == JOB) else {
            return missing("this server was started without fine-tuning");
        };
        match self.job_folders() {
            Some(folders) => Ok((job, folders)),
            None => missing("this server keeps nothing, so it cannot fine-tune; it has to be started with `--store`"),
        }
    }

    /// Where jobs have their folders, if this server keeps anything.
    fn job_folders(&self) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join("jobs"))
    }
}

/// A new job.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Result<Json<Value>, ApiError> {
    app.tuning()?;
    let asked = request::read(&body)?;
    let (slot, start) = base(&app, &asked.model)?;
    let base = slot.name.clone();
    let kept_app = Arc::clone(&app);
    let job = blocking(move || {
        for (param, id) in
            [("training_file", Some(&asked.training_file)), ("validation_file", asked.validation_file.as_ref())]
        {
            let Some(id) = id else { continue };
            let of_param = |error| ApiError { param: Some(param.to_owned()), ..error };
            let file = files::find(&kept_app, &caller, id).map_err(of_param)?;
            if file["purpose"] != "fine-tune" {
                let message = format!("`{param}` is a file for {}, expected one for fine-tune", file["purpose"]);
                return Err(ApiError::invalid(param, message));
            }
        }
        let _order = kept_app.job_order.lock().unwrap_or_else(PoisonError::into_inner);
        if kept_app.store.all(JOBS)?.iter().filter(|job| !is_over(job)).count() >= JOBS_MAX {
            let message =
                format!("{JOBS_MAX} jobs are waiting or running, which is the most; cancel one, or come later");
            let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
            return Err(ApiError { retry_after_s: Some(600), ..error.with_code("queue_full") });
        }
        let job = record::new(&kept_app, &caller, asked, &base, start);
        let mut edit = Edit::default();
        edit.tell(Level::Info, &format!("Created fine-tuning job: {}", text(&job, "id")));
        record::put(&kept_app, job, edit)
    })
    .await?;
    app.job_work.notify_one();
    Ok(Json(shown(job)))
}

/// The model of this name, and the adapter to begin with where it is one's.
fn base<'a>(app: &'a App, name: &str) -> Result<(&'a Arc<Slot>, Option<PathBuf>), ApiError> {
    let Some((slot, own)) = app.models.adapter(name) else { return Ok((app.models.slot(Some(name))?, None)) };
    let path = slot.adapters.path(&own).and_then(|path| std::path::absolute(path).ok());
    Ok((slot, Some(path.ok_or_else(|| app.models.unknown(name))?)))
}

fn find(app: &App, caller: &Caller, id: &str) -> Result<Value, ApiError> {
    own(app, caller, (JOBS, "fine-tuning job"), id)
}

/// One job.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || find(&app, &caller, &id)).await.map(shown).map(Json)
}

/// The caller's jobs.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let mut own = blocking(move || all_own(&app, &caller, JOBS)).await?;
    own.sort_by_key(record::order);
    if !wanted.is_ascending()? {
        own.reverse();
    }
    window(own.into_iter().map(shown).collect(), &wanted).map(Json)
}

/// What has happened in a job, the newest first.
pub(crate) async fn events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let events = blocking(move || {
        find(&app, &caller, &id)?;
        app.store.events(&id)
    });
    let mut events = events.await?;
    if !wanted.is_ascending()? {
        events.reverse();
    }
    window(events, &wanted).map(Json)
}

/// What of a job can be asked as a model: what it has made, as only the best of its states is kept.
pub(crate) async fn checkpoints(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    wanted: Page,
) -> Result<Json<Value>, ApiError> {
    let job = blocking(move || find(&app, &caller, &id)).await?;
    window(record::checkpoint(&job).into_iter().collect(), &wanted).map(Json)
}

/// Ends a job early; nothing of it stays.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    const OPEN: &[&str] = &["validating_files", "queued", "running", "paused"];
    steer(app, caller, id, ("cancelled", OPEN), "The job was cancelled").await
}

/// Has a job wait where it is.
pub(crate) async fn pause(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    steer(app, caller, id, ("paused", &["validating_files", "queued", "running"]), "The job was paused").await
}

/// Has a job go on that was paused.
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    steer(app, caller, id, ("queued", &["paused"]), "The job waits for its turn to go on").await
}

/// Brings a job from one of the states `from` to another.
async fn steer(
    app: Arc<App>,
    caller: Caller,
    id: String,
    (to, from): (&'static str, &'static [&'static str]),
    told: &'static str,
) -> Result<Json<Value>, ApiError> {
    let kept_app = Arc::clone(&app);
    let job = blocking(move || {
        let app = kept_app;
        find(&app, &caller, &id)?;
        let job = record::change(&app, &id, |job, edit: &mut Edit| {
            let status = text(job, "status");
            if !from.contains(&status.as_str()) {
                let message = format!("the job is {status} and cannot become {to}");
                return Err(ApiError::invalid("fine_tuning_job_id", message));
            }
            job["status"] = json!(to);
            if to == "cancelled" {
                job["finished_at"] = json!(unix_s());
            }
            edit.tell(Level::Info, told);
            Ok(())
        })?;
        // One that runs is cleared away when it has stopped.
        if to == "cancelled" && app.running_job().as_deref() != Some(&*id) {
            worker::clear(&app, &id);
        }
        Ok(job)
    })
    .await?;
    app.job_work.notify_one();
    Ok(Json(shown(job)))
}

/// Gives the models that earlier servers have made their names, and clears away what they left of other jobs.
///
/// # Errors
/// When the store cannot be read.
pub(crate) fn restore(app: &App) -> Result<(), ApiError> {
    let Some(folder) = app.job_folders() else { return Ok(()) };
    let mut jobs = app.store.all(JOBS)?;
    jobs.sort_by_key(record::order);
    for job in jobs {
        let (id, name) = (text(&job, "id"), text(&job, "fine_tuned_model"));
        match record::adapter(&job) {
            Some(adapter) => {
                let source = AdapterSource { name: name.clone(), path: folder.join(&id).join(adapter) };
                let base = record::base(&job);
                let slot = app.models.slots().iter().find(|slot| slot.name == base);
                match slot {
                    // Its name comes back when its base model does.
                    None => app.warn(&format!("{name} is not served: its base model {base} is not")),
                    Some(slot) if source.path.exists() => {
                        if !app.models.add_adapter(slot, source, None) {
                            app.warn(&format!("{name} is not served: another model has its name"));
                        }
                    }
                    Some(_) => app.warn(&format!("{name} is not served: {} is gone", source.path.display())),
                }
            }
            None if is_over(&job) => worker::clear(app, &id),
            None => {}
        }
    }
    Ok(())
}

/// `DELETE /v1/models/{name}`: forgets what a job has made.
pub(crate) async fn delete_model(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let made = |job: &Value| job["fine_tuned_model"] == *name && record::adapter(job).is_some();
        let job = all_own(&app, &caller, JOBS)?.into_iter().find(made);
        let Some(job) = job else {
            if !app.models.has_name(&name) {
                return Err(app.models.unknown(&name));
            }
            let message = format!("{name} was not made by a fine-tuning job of yours, so it cannot be deleted");
            return Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message));
        };
        let id = text(&job, "id");
        record::change(&app, &id, |job, edit| {
            record::forget_adapter(job);
            edit.tell(Level::Info, &format!("The model was deleted: {name}"));
            Ok(())
        })?;
        app.models.slots().iter().for_each(|slot| {
            slot.adapters.remove(&name);
        });
        // Answers under way have the adapter in memory.
        worker::clear(&app, &id);
        Ok(Json(json!({ "id": name, "object": "model", "deleted": true })))
    })
    .await
}

/// The content of a file of the caller's.
fn content(app: &App, id: &str) -> Result<Option<Vec<u8>>, ApiError> {
    match app.store.get(FILES, id)? {
        Some(_) => app.store.content(id),
        None => Ok(None),
    }
}
