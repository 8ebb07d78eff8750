//! `/metrics`: load and work in Prometheus' text format, under this server's names and under those of vLLM, which routers
//! read.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{
    extract::State,
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use qwenkit_engine::{Load, Summary};

use crate::{
    app::App,
    error::ApiError,
    fine_tuning::{Standing, standing},
    text::blocking,
};

/// Upper ends of the classes of times, in seconds.
const CLASSES_S: [f64; 14] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0];

/// Times, counted in classes.
#[derive(Debug, Default)]
struct Times {
    classes: [AtomicU64; CLASSES_S.len()],
    count: AtomicU64,
    sum_us: AtomicU64,
}

impl Times {
    fn add(&self, seconds: f64) {
        if let Some(class) = CLASSES_S.iter().position(|&end| seconds <= end) {
            self.classes[class].fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add((seconds * 1e6) as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, label: &str) {
        let mut below = 0;
        for (class, end) in self.classes.iter().zip(CLASSES_S) {
            below += class.load(Ordering::Relaxed);
            line(out, &format!("{name}_bucket{{{label},le=\"{end}\"}}"), below as f64);
        }
        let count = self.count.load(Ordering::Relaxed) as f64;
        line(out, &format!("{name}_bucket{{{label},le=\"+Inf\"}}"), count);
        line(out, &format!("{name}_count{{{label}}}"), count);
        line(out, &format!("{name}_sum{{{label}}}"), self.sum_us.load(Ordering::Relaxed) as f64 / 1e6);
    }
}

/// How long a model's answers have taken since the start.
#[derive(Debug, Default)]
pub(crate) struct Work {
    first_token: Times,
    per_token: Times,
    whole: Times,
}

impl Work {
    /// An answer has ended.
    pub(crate) fn add(&self, summary: &Summary) {
        if !summary.ids.is_empty() {
            self.first_token.add(summary.prompt_ms / 1e3);
            self.whole.add((summary.prompt_ms + summary.generate_ms) / 1e3);
        }
        if summary.ids.len() > 1 {
            self.per_token.add(summary.generate_ms / 1e3 / (summary.ids.len() - 1) as f64);
        }
    }
}

/// Responses by path and status.
#[derive(Debug, Default)]
pub(crate) struct Responses(Mutex<BTreeMap<(String, u16), u64>>);

impl Responses {
    /// `path` is that of a route, not of a request: there are few of them.
    pub(crate) fn add(&self, path: &str, status: u16) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry((path.to_owned(), status)).or_default() += 1;
    }
}

/// The handler.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let mut out = String::new();
    head(&mut out, "qwenkit_http_responses_total", "counter", "Responses by path and status.");
    for ((path, status), count) in &*app.responses.0.lock().unwrap_or_else(PoisonError::into_inner) {
        line(
            &mut out,
            &format!("qwenkit_http_responses_total{{path=\"{}\",status=\"{status}\"}}", escaped(path)),
            *count as f64,
        );
    }
    head(&mut out, "qwenkit_uptime_seconds", "gauge", "Seconds since the start.");
    line(&mut out, "qwenkit_uptime_seconds", app.started.elapsed().as_secs_f64());
    let kept_app = Arc::clone(&app);
    tuning(&blocking(move || standing(&kept_app)).await?, &mut out);
    for prefix in ["qwenkit_", "vllm:"] {
        gauges(&app, prefix, &mut out);
        counters(&app, prefix, &mut out);
        times(&app, prefix, &mut out);
    }
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], out).into_response())
}

/// Fine-tuning, which no other server has names for.
fn tuning(standing: &Standing, out: &mut String) {
    let name = "qwenkit_fine_tuning_jobs";
    head(out, name, "gauge", "Fine-tuning jobs that the server keeps, by state.");
    for (state, count) in &standing.jobs {
        line(out, &format!("{name}{{status=\"{state}\"}}"), *count as f64);
    }
    let mut one = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        let name = format!("qwenkit_fine_tuning_{name}");
        head(out, &name, kind, help);
        value.into_iter().for_each(|value| line(out, &name, value));
    };
    one("steps_total", "counter", "Steps of fine-tuning since the start.", Some(standing.steps as f64));
    one("trained_tokens_total", "counter", "Tokens learnt from since the start.", Some(standing.tokens as f64));
    // Absent where no job is under way.
    let running = standing.running.as_ref();
    one("running_step", "gauge", "Steps done of the job under way.", running.map(|job| job.step as f64));
    one("running_steps", "gauge", "Steps in all of the job under way.", running.map(|job| job.steps as f64));
    let speed = running.and_then(|job| job.tokens_per_s);
    one("running_tokens_per_second", "gauge", "Tokens that the job under way learns from in a second.", speed);
}

fn gauges(app: &App, prefix: &str, out: &mut String) {
    let mut gauge = |name: &str, help: &str, value: &dyn Fn(&Load) -> f64| {
        let name = format!("{prefix}{name}");
        head(out, &name, "gauge", help);
        for model in app.models.loaded() {
            line(out, &format!("{name}{{{}}}", label(&model.name)), value(&model.session.load()));
        }
    };
    let share = |load: &Load| load.pages_used as f64 / load.pages_total.max(1) as f64;
    gauge("num_requests_running", "Requests under way.", &|load| load.running as f64);
    gauge("num_requests_waiting", "Requests that wait for their turn.", &|load| load.waiting as f64);
    gauge("kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", &share);
    gauge("gpu_cache_usage_perc", "The same under its older name.", &share);
}

fn counters(app: &App, prefix: &str, out: &mut String) {
    let mut counter = |name: &str, help: &str, value: fn(&Load) -> u64| {
        let name = format!("{prefix}{name}_total");
        head(out, &name, "counter", help);
        for model in app.models.loaded() {
            line(out, &format!("{name}{{{}}}", label(&model.name)), value(&model.session.load()) as f64);
        }
    };
    counter("request_success", "Answers that came to their end.", |load| load.finished);
    counter("prompt_tokens", "Tokens of prompts.", |load| load.prompt_tokens);
    counter("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.", |load| load.prompt_tokens);
    counter("prefix_cache_hits", "Tokens of prompts that were found in the cache.", |load| load.cached_tokens);
    counter("prefix_cache_disk", "Tokens whose state was read from files.", |load| load.disk_tokens);
    counter("prefix_cache_write_failures", "Kept states that could not be written.", |load| load.disk_failures);
    counter("num_preemptions", "Times that a request gave its pages to another.", |load| load.preempted);
    counter("generation_tokens", "Tokens generated.", |load| load.generated_tokens);
    counter("spec_decode_num_draft_tokens", "Tokens guessed ahead of the model.", |load| load.drafted_tokens);
    counter("spec_decode_num_accepted_tokens", "Of these, tokens that the model said.", |load| load.accepted_tokens);
}

fn times(app: &App, prefix: &str, out: &mut String) {
    let mut histogram = |name: &str, help: &str, value: fn(&Work) -> &Times| {
        let name = format!("{prefix}{name}_seconds");
        head(out, &name, "histogram", help);
        for model in app.models.loaded() {
            value(&model.work).write(out, &name, &label(&model.name));
        }
    };
    histogram("time_to_first_token", "From the question to the first token.", |work| &work.first_token);
    histogram("time_per_output_token", "Between two tokens of an answer, on average.", |work| &work.per_token);
    histogram("e2e_request_latency", "From the question to the last token.", |work| &work.whole);
}

fn label(model: &str) -> String {
    format!("model_name=\"{}\"", escaped(model))
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, value: f64) {
    let _ = writeln!(out, "{name} {value}");
}
