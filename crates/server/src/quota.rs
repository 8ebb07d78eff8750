//! How much a key may ask for: requests and tokens, in a minute and in a day.
//!
//! Contract: a request that goes beyond is refused with the moment when it fits; tokens count when an answer ends or is left,
//! so the answer that crosses a limit is finished.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::error::ApiError;

/// Limits of a key; absent ones do not bind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Requests in a minute.
    pub requests_per_minute: Option<u64>,
    /// Requests in a day.
    pub requests_per_day: Option<u64>,
    /// Tokens, of prompts and answers, in a minute.
    pub tokens_per_minute: Option<u64>,
    /// The same in a day.
    pub tokens_per_day: Option<u64>,
}

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// What a key has used, in the window at hand.
#[derive(Debug)]
struct Window {
    length: Duration,
    begun: Instant,
    requests: u64,
    tokens: u64,
}

impl Window {
    fn new(length: Duration) -> Window {
        Window { length, begun: Instant::now(), requests: 0, tokens: 0 }
    }

    /// A new window if this one is over.
    fn turn(&mut self, now: Instant) {
        if now.duration_since(self.begun) >= self.length {
            *self = Window { begun: now, requests: 0, tokens: 0, ..*self };
        }
    }

    fn left(&self, now: Instant) -> Duration {
        self.length.saturating_sub(now.duration_since(self.begun))
    }
}

/// What one key uses, against its limits.
#[derive(Clone, Debug)]
pub(crate) struct Meter {
    quota: Quota,
    windows: Arc<Mutex<[Window; 2]>>,
}

impl Meter {
    pub(crate) fn new(quota: Quota) -> Meter {
        Meter { quota, windows: Arc::new(Mutex::new([Window::new(MINUTE), Window::new(DAY)])) }
    }

    fn windows(&self) -> MutexGuard<'_, [Window; 2]> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> [(Option<u64>, Option<u64>, &'static str); 2] {
        let quota = self.quota;
        [
            (quota.requests_per_minute, quota.tokens_per_minute, "minute"),
            (quota.requests_per_day, quota.tokens_per_day, "day"),
        ]
    }

    /// Counts a request in.
    ///
    /// # Errors
    /// When it is beyond a limit; it is not counted then.
    pub(crate) fn enter(&self) -> Result<(), ApiError> {
        let now = Instant::now();
        let mut windows = self.windows();
        for (window, (requests, tokens, name)) in windows.iter_mut().zip(self.limits()) {
            window.turn(now);
            let over = match (requests, tokens) {
                (Some(most), _) if window.requests >= most => Some(format!("{most} requests")),
                (_, Some(most)) if window.tokens >= most => Some(format!("{most} tokens")),
                _ => None,
            };
            if let Some(limit) = over {
                let seconds = window.left(now).as_secs() + 1;
                let message = format!("this key may use {limit} in a {name}, and has; ask again in {seconds} s");
                let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
                return Err(ApiError { retry_after_s: Some(seconds), ..error.with_code("rate_limit_exceeded") });
            }
        }
        windows.iter_mut().for_each(|window| window.requests += 1);
        Ok(())
    }

    /// Counts tokens of an answer.
    pub(crate) fn add_tokens(&self, tokens: usize) {
        self.windows().iter_mut().for_each(|window| window.tokens += tokens as u64);
    }

    /// Says what is left of the limits that are nearest: the minute's, else the day's.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let now = Instant::now();
        let windows = self.windows();
        for (kind, of) in [("requests", 0), ("tokens", 1)] {
            let found = windows.iter().zip(self.limits()).find_map(|(window, (requests, tokens, _))| match of {
                0 => Some((requests?, window.requests, window.left(now))),
                _ => Some((tokens?, window.tokens, window.left(now))),
            });
            let Some((limit, used, left)) = found else { continue };
            let values = [
                ("limit", limit.to_string()),
                ("remaining", limit.saturating_sub(used).to_string()),
                ("reset", format!("{}s", left.as_secs())),
            ];
            for (name, value) in values {
                let name = HeaderName::from_bytes(format!("x-ratelimit-{name}-{kind}").as_bytes());
                if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
                    headers.insert(name, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_tokens_run_out() {
        let meter = Meter::new(Quota { requests_per_minute: Some(3), tokens_per_day: Some(10), ..Quota::default() });
        assert!(meter.enter().is_ok());
        meter.add_tokens(9);
        assert!(meter.enter().is_ok());
        meter.add_tokens(5);
        let error = meter.enter().unwrap_err();
        assert!(error.message.contains("10 tokens in a day") && error.retry_after_s > Some(86_000), "{error:?}");
        let mut headers = HeaderMap::new();
        meter.tell(&mut headers);
        assert_eq!(
            (&headers["x-ratelimit-remaining-requests"], &headers["x-ratelimit-remaining-tokens"]),
            (&HeaderValue::from_static("1"), &HeaderValue::from_static("0"))
        );
        let meter = Meter::new(Quota { requests_per_minute: Some(1), ..Quota::default() });
        assert!(meter.enter().is_ok());
        assert!(meter.enter().unwrap_err().message.contains("1 requests in a minute"));
    }
}
