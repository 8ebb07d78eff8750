//! A run folder as one HTML page: curves, and everything that the run's record says.
//!
//! Contract: the page is whole by itself; it asks for nothing from anywhere, and nothing that stands in a record can become markup. A folder
//! of a run that still goes on, or was cut off, gives the page of what is there.

mod svg;

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use svg::{Chart, Series};

/// The file with a run's figures, a JSON object a line.
pub const METRICS: &str = "metrics.jsonl";
/// The file that says what the run was.
pub const RECORD: &str = "qwenkit.json";
/// The page.
pub const REPORT: &str = "report.html";

/// Why there is no page.
#[derive(Debug, Error)]
pub enum ReportError {
    /// A file that cannot be read or written.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A folder without figures.
    #[error("`{}` holds no figures of a run: expected the file {METRICS} with a step\nhint: name the folder given to tune --out", path.display())]
    NoFigures {
        /// The folder.
        path: PathBuf,
    },
}

/// Figures of a step; what is absent was not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Step {
    /// The step, from 1.
    pub step: u64,
    /// Mean loss of its tokens.
    pub loss: Option<f64>,
    /// Mean loss over what is kept apart.
    pub validation_loss: Option<f64>,
    /// Share of labels named right there.
    pub validation_right: Option<f64>,
    /// The learning rate.
    pub rate: Option<f64>,
    /// Length of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens of the step.
    pub tokens: Option<f64>,
    /// Its time in milliseconds.
    pub time_ms: Option<f64>,
}

/// Writes the page of a run folder into it and says where.
///
/// # Errors
/// When there are no figures, or a file cannot be read or written.
pub fn write(folder: &Path) -> Result<PathBuf, ReportError> {
    let steps = read_steps(folder)?;
    let path = folder.join(RECORD);
    let record = match fs::read(&path) {
        // A record is written at the end; a run that still goes on has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Value::Null,
        Err(source) => return Err(ReportError::Io { action: "read", path, source }),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| ReportError::Io {
            action: "read",
            path,
            source: error.into(),
        })?,
    };
    let path = folder.join(REPORT);
    // Whoever looks at the page while it is written sees the last whole one.
    let half = folder.join(format!("{REPORT}.part"));
    let written = fs::write(&half, page(&record, &steps)).and_then(|()| fs::rename(&half, &path));
    match written {
        Ok(()) => Ok(path),
        Err(source) => Err(ReportError::Io { action: "write", path, source }),
    }
}

/// The figures of a run folder, by step. Lines that a crash cut off are passed over.
///
/// # Errors
/// When there are none.
pub fn read_steps(folder: &Path) -> Result<Vec<Step>, ReportError> {
    let path = folder.join(METRICS);
    let failed = |source| ReportError::Io { action: "read", path: path.clone(), source };
    let file = match fs::File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ReportError::NoFigures { path: folder.to_owned() });
        }
        opened => opened.map_err(failed)?,
    };
    let mut steps: Vec<Step> = Vec::new();
    for line in BufReader::new(file).lines() {
        let Ok(value) = serde_json::from_str::<Value>(&line.map_err(failed)?) else { continue };
        let Some(step) = value.get("step").and_then(Value::as_u64) else { continue };
        let number = |key: &str| value.get(key).and_then(Value::as_f64).filter(|number| number.is_finite());
        steps.push(Step {
            step,
            loss: number("loss"),
            validation_loss: number("validation_loss"),
            validation_right: number("validation_right"),
            rate: number("lr"),
            grad_norm: number("grad_norm"),
            tokens: number("tokens"),
            time_ms: number("ms"),
        });
    }
    // A validation stands behind the step that it followed.
    steps.sort_by_key(|step| step.step);
    if steps.is_empty() { Err(ReportError::NoFigures { path: folder.to_owned() }) } else { Ok(steps) }
}

/// The page.
pub fn page(record: &Value, steps: &[Step]) -> String {
    let points = |value: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
    };
    let loss = points(|step| step.loss);
    let speed = points(|step| Some(step.tokens? / step.time_ms.filter(|&ms| ms > 0.0)? * 1000.0));
    let charts = [
        Chart {
            title: "Loss",
            series: vec![
                Series::faint("each step", loss.clone()),
                Series::line("mean of the last steps", smoothed(&loss)),
                Series::dots("validation", points(|step| step.validation_loss)),
            ],
            from_zero: false,
        },
        Chart {
            title: "Labels named right in validation",
            series: vec![Series::dots("validation", points(|step| step.validation_right))],
            from_zero: false,
        },
        Chart { title: "Learning rate", series: vec![Series::line("rate", points(|step| step.rate))], from_zero: true },
        Chart {
            title: "Length of the gradient",
            series: vec![Series::line("each step", points(|step| step.grad_norm))],
            from_zero: true,
        },
        Chart {
            title: "Tokens per second",
            series: vec![
                Series::faint("each step", speed.clone()),
                Series::line("mean of the last steps", smoothed(&speed)),
            ],
            from_zero: true,
        },
    ];
    let name = record.pointer("/base/name").and_then(Value::as_str).unwrap_or("a model");
    let title = escaped(&format!("Tuning of {name}"));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{}",
        summary(steps)
    );
    for chart in charts.iter().filter(|chart| !chart.is_empty()) {
        page.push_str(&chart.to_svg());
    }
    if record.is_null() {
        page.push_str("<p>The run has not come to its end; its record will stand here.</p>\n");
    } else {
        page.push_str("<h2>Record</h2>\n");
        page.push_str(&value_html(record));
    }
    page.push_str("</body>\n</html>\n");
    page
}

/// First and last figures as a table.
fn summary(steps: &[Step]) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    let losses: Vec<&Step> = steps.iter().filter(|step| step.loss.is_some()).collect();
    if let (Some(first), Some(last)) = (losses.first(), losses.last()) {
        rows.push(("steps", format!("{}", last.step)));
        let both = (first.loss.unwrap_or_default(), last.loss.unwrap_or_default());
        rows.push(("loss, first and last step", format!("{:.4} and {:.4}", both.0, both.1)));
    }
    let best = steps.iter().filter(|step| step.validation_loss.is_some());
    if let Some(best) = best.min_by(|one, other| {
        one.validation_loss.partial_cmp(&other.validation_loss).unwrap_or(std::cmp::Ordering::Equal)
    }) {
        let right = best.validation_right.map_or_else(String::new, |right| format!(", {:.2}% right", right * 100.0));
        let loss = best.validation_loss.unwrap_or_default();
        rows.push(("best validation", format!("loss {loss:.4}{right}, at step {}", best.step)));
    }
    let tokens: f64 = steps.iter().filter_map(|step| step.tokens).sum();
    let seconds: f64 = steps.iter().filter_map(|step| step.time_ms).sum::<f64>() / 1000.0;
    if tokens > 0.0 && seconds > 0.0 {
        rows.push(("tokens", format!("{tokens:.0} in {seconds:.0} s, {:.0} a second", tokens / seconds)));
    }
    let rows: String = rows.iter().map(|(name, value)| format!("<tr><th>{name}</th><td>{value}</td></tr>\n")).collect();
    format!("<table>\n{rows}</table>\n")
}

/// The mean that forgets: each step counts a tenth less than the one after it, as far as there are steps.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = |&(x, y): &(f64, f64)| {
        sum = sum * 0.9 + y;
        weight = weight * 0.9 + 1.0;
        (x, sum / weight)
    };
    points.iter().map(mean).collect()
}

/// A value as nested tables.
fn value_html(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let row = |(key, value): (&String, &Value)| {
                format!("<tr><th>{}</th><td>{}</td></tr>\n", escaped(key), value_html(value))
            };
            format!("<table>\n{}</table>\n", object.iter().map(row).collect::<String>())
        }
        // Long lists, such as labels, in a line that wraps.
        Value::Array(list) if list.len() > 24 => {
            let items: Vec<String> = list.iter().map(value_html).collect();
            format!("<details><summary>{} entries</summary>{}</details>", list.len(), items.join(", "))
        }
        Value::Array(list) => list.iter().map(|value| format!("<div>{}</div>", value_html(value))).collect(),
        Value::String(text) => escaped(text),
        Value::Null => "none".to_owned(),
        other => escaped(&other.to_string()),
    }
}

/// Text as HTML.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#6b7280;--line:#e5e7eb;--paper:#fff;--one:#2563eb;--two:#d97706}\
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3af;--line:#30363d;--paper:#14171b;--one:#60a5fa;--two:#fbbf24}}\
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:820px;margin:2em auto;padding:0 1em}\
table{border-collapse:collapse;margin:.5em 0}th,td{text-align:left;vertical-align:top;padding:.15em .8em .15em 0}\
th{font-weight:500;color:var(--soft);white-space:nowrap}td{overflow-wrap:anywhere}\
figure{margin:1.5em 0}figcaption{font-weight:600}svg{width:100%;height:auto}\
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--line)}\
.line{fill:none;stroke:var(--one);stroke-width:1.8;stroke-linejoin:round}.faint{fill:none;stroke:var(--one);stroke-width:1;opacity:.3}\
.dots{fill:none;stroke:var(--two);stroke-width:1.4}.dot{fill:var(--two)}\
@media print{body{margin:0}}";

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(count: u64) -> Vec<Step> {
        let step = |step: u64| Step {
            step,
            loss: Some(3.0 / step as f64),
            rate: Some(1e-4),
            tokens: Some(1000.0),
            time_ms: Some(500.0),
            ..Step::default()
        };
        let mut steps: Vec<Step> = (1..=count).map(step).collect();
        steps.push(Step { step: count, validation_loss: Some(0.5), validation_right: Some(0.925), ..Step::default() });
        steps
    }

    #[test]
    fn a_page_is_whole_by_itself_and_records_cannot_become_markup() {
        let record = serde_json::json!({"base": {"name": "<script>alert(1)</script>"}, "data": {"sha256": "ab12"},
            "settings": ["seed: 0", "lr: 2e-4"], "classifier": {"labels": vec!["a&b"; 30]}});
        let page = page(&record, &steps(50));
        assert!(!page.contains("<script"), "{page}");
        for part in
            ["ab12", "seed: 0", "30 entries", "a&amp;b", "loss 0.5000, 92.50% right, at step 50", "2000 a second"]
        {
            assert!(page.contains(part), "no {part}");
        }
        // Nothing is fetched.
        for outside in ["http:", "https:", "src=", "@import", "url(", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert_eq!(page.matches("<svg").count(), 4);
        assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
        assert!(!page.contains("NaN") && !page.contains("inf"));
    }

    #[test]
    fn folders_without_figures_say_so_and_half_lines_are_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(write(folder.path()).expect_err("nothing there").to_string().contains(METRICS));
        let text = "{\"step\": 2, \"loss\": 1.5, \"lr\": 0.1}\n{\"step\": 1, \"loss\": 2.5}\n{\"step\": 3, \"lo";
        fs::write(folder.path().join(METRICS), text).expect("written");
        assert_eq!(read_steps(folder.path()).expect("steps").iter().map(|step| step.step).collect::<Vec<_>>(), [1, 2]);
        let path = write(folder.path()).expect("a page");
        let page = fs::read_to_string(path).expect("readable");
        assert!(page.contains("has not come to its end") && page.contains("2.5000 and 1.5000"), "{page}");
        fs::write(folder.path().join(RECORD), "{").expect("written");
        assert!(write(folder.path()).expect_err("no JSON").to_string().contains(RECORD));
    }

    #[test]
    fn the_mean_follows_the_figures() {
        assert_eq!(smoothed(&[(1.0, 2.0), (2.0, 2.0)]), [(1.0, 2.0), (2.0, 2.0)]);
        let mean = smoothed(&[(1.0, 0.0), (2.0, 1.0)]);
        assert!((mean[1].1 - 1.0 / 1.9).abs() < 1e-12);
    }
}
