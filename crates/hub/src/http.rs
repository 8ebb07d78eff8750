//! One GET request at a time: timeouts, redirects followed by hand, and the words for what failed.
//!
//! Contract: a token goes to the origin it was meant for and to no other, whatever a redirect says; an https address
//! never leads to an http one. Not here: repeating a request (`listing`, `download`).

use std::io::Read;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, Uri};
use ureq::{Agent, Body, Timeout};

use crate::{Error, Pacing};

const REDIRECTS_MAX: usize = 8;
/// Listings of the largest repositories are a few megabytes.
const JSON_BYTES_MAX: u64 = 64 << 20;
const USER_AGENT: &str = concat!("qwenkit/", env!("CARGO_PKG_VERSION"));

/// Speaks to one hub. Deliberately without Debug: it holds the token.
pub(crate) struct Client {
    agent: Agent,
    endpoint: String,
    origin: Origin,
    token: Option<String>,
    pub(crate) pacing: Pacing,
}

/// Why a request brought no reply.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection came about.
    Unreachable { host: String, reason: String },
    /// A connection was there and broke.
    Broken(String),
    /// The reply cannot be accepted; another attempt would not change it.
    Refused(Error),
}

/// What to ask for beyond the address.
#[derive(Debug, Default)]
pub(crate) struct Ask<'a> {
    /// First byte wanted; 0 asks for the whole.
    pub(crate) from_byte: u64,
    /// The range counts only for the content with this entity tag.
    pub(crate) if_range: Option<&'a str>,
}

/// A reply whose body is still to be read.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    body: Body,
}

impl Client {
    /// A client for the hub at `endpoint`.
    ///
    /// # Errors
    /// [`Error::BadAnswer`] if `endpoint` is no http address.
    pub(crate) fn new(endpoint: String, token: Option<&str>, pacing: &Pacing) -> Result<Client, Error> {
        let origin = Origin::of(&endpoint)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(USER_AGENT)
            .timeout_resolve(Some(pacing.connect_timeout))
            .timeout_connect(Some(pacing.connect_timeout))
            .timeout_recv_response(Some(pacing.silence_timeout))
            .timeout_per_read(Some(pacing.silence_timeout));
        if origin.is_loopback() {
            // A mirror on this machine is not behind the company's proxy.
            config = config.proxy(None);
        }
        let agent = Agent::new_with_config(config.build());
        Ok(Client { agent, endpoint, origin, token: token.map(str::to_owned), pacing: pacing.clone() })
    }

    /// Address of the hub without a trailing slash.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Whether requests carry a token.
    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Asks for `url`, following redirects.
    pub(crate) fn get(&self, url: &str, ask: &Ask) -> Result<Reply, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=REDIRECTS_MAX {
            let response = self.get_once(&url, ask)?;
            let status = response.status().as_u16();
            if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                let (parts, body) = response.into_parts();
                return Ok(Reply { status, headers: parts.headers, body });
            }
            let location = response.headers().get("location").and_then(|value| value.to_str().ok()).unwrap_or_default();
            url = follow(&url, location).map_err(Failure::Refused)?;
        }
        let reason = format!("more than {REDIRECTS_MAX} redirects");
        Err(Failure::Refused(Error::BadAnswer { url: without_query(&url), reason }))
    }

    fn get_once(&self, url: &str, ask: &Ask) -> Result<Response<Body>, Failure> {
        let origin = Origin::of(url).map_err(Failure::Refused)?;
        let mut request = self.agent.get(url);
        if let Some(token) = self.token.as_ref().filter(|_| origin == self.origin) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if ask.from_byte > 0 {
            request = request.header("range", format!("bytes={}-", ask.from_byte));
            if let Some(tag) = ask.if_range {
                request = request.header("if-range", tag);
            }
        }
        request.call().map_err(|error| failure(error, &origin))
    }
}

impl Reply {
    /// A header's text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Length of the body as announced.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.header("content-length")?.trim().parse().ok()
    }

    /// `(first, total)` of `Content-Range: bytes first-last/total`.
    pub(crate) fn content_range(&self) -> Option<(u64, Option<u64>)> {
        let (range, total) = self.header("content-range")?.trim().strip_prefix("bytes")?.trim().split_once('/')?;
        Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
    }

    /// The entity tag, if it promises identical bytes.
    pub(crate) fn strong_etag(&self) -> Option<&str> {
        self.header("etag").filter(|tag| tag.starts_with('"'))
    }

    /// How long the server asks to be left alone, at most a minute.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        const LONGEST_S: u64 = 60;
        let seconds: u64 = self.header("retry-after")?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds.min(LONGEST_S)))
    }

    /// The body as a stream.
    pub(crate) fn into_reader(self) -> impl Read {
        self.body.into_reader()
    }

    /// The body as JSON.
    pub(crate) fn into_json(mut self, url: &str) -> Result<serde_json::Value, Failure> {
        let bytes = self.body.with_config().limit(JSON_BYTES_MAX).read_to_vec();
        let bytes = bytes.map_err(|error| Failure::Broken(chain(&error)))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            let reason = format!("expected JSON, found {} bytes that are not ({error})", bytes.len());
            Failure::Refused(Error::BadAnswer { url: without_query(url), reason })
        })
    }
}

/// Wait before attempt `attempt` (the second is 1): one second, doubled each time, at most half a minute.
pub(crate) fn backoff(attempt: u32) -> Duration {
    Duration::from_secs(1_u64 << attempt.saturating_sub(1).min(5)).min(Duration::from_secs(30))
}

/// Percent-encodes one segment of a path.
pub(crate) fn encode_segment(segment: &str) -> String {
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// Percent-encodes a path, keeping its slashes.
pub(crate) fn encode_path(path: &str) -> String {
    path.split('/').map(encode_segment).collect::<Vec<_>>().join("/")
}

/// An address fit for messages: signed redirects carry secrets in their query.
pub(crate) fn without_query(url: &str) -> String {
    url.split(['?', '#']).next().unwrap_or_default().to_owned()
}

/// Scheme, host and port: what must be equal for a token to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    fn of(url: &str) -> Result<Origin, Error> {
        let bad = |reason: String| Error::BadAnswer { url: without_query(url), reason };
        let uri: Uri = url.parse().map_err(|error| bad(format!("not an address ({error})")))?;
        let scheme = uri.scheme_str().unwrap_or_default().to_ascii_lowercase();
        let default_port = match scheme.as_str() {
            "https" => 443,
            "http" => 80,
            _ => return Err(bad("expected an address that starts with https:// or http://".to_owned())),
        };
        let host = uri.host().unwrap_or_default().to_ascii_lowercase();
        if host.is_empty() {
            return Err(bad("the address names no host".to_owned()));
        }
        Ok(Origin { scheme, host, port: uri.port_u16().unwrap_or(default_port) })
    }

    fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host == "[::1]" || self.host.starts_with("127.")
    }
}

/// The address a redirect from `url` leads to.
fn follow(url: &str, location: &str) -> Result<String, Error> {
    let bad = |reason: String| Error::BadAnswer { url: without_query(url), reason };
    if location.is_empty() {
        return Err(bad("a redirect without a Location".to_owned()));
    }
    let from = Origin::of(url)?;
    let base = without_query(url);
    let authority_end = base.find("://").map_or(0, |i| i + 3);
    let path_start = base[authority_end..].find('/').map_or(base.len(), |i| authority_end + i);
    let target = if location.contains("://") && !location.starts_with('/') {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{}:{location}", from.scheme)
    } else if location.starts_with('/') {
        format!("{}{location}", &base[..path_start])
    } else {
        let folder_end = base.rfind('/').filter(|i| *i >= path_start).unwrap_or(base.len());
        format!("{}/{location}", &base[..folder_end])
    };
    let to = Origin::of(&target)?;
    if from.scheme == "https" && to.scheme != "https" {
        return Err(bad(format!("a redirect from https to {}://{}", to.scheme, to.host)));
    }
    Ok(target)
}

/// Sorts the client's errors into "no connection came about" and "it broke".
fn failure(error: ureq::Error, origin: &Origin) -> Failure {
    use std::io::ErrorKind as Kind;
    let never_connected = match &error {
        ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => true,
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::InvalidProxyUrl | ureq::Error::BadUri(_) => true,
        ureq::Error::Timeout(which) => matches!(which, Timeout::Resolve | Timeout::Connect),
        // A failed name lookup has no kind of its own, so what only a living connection can say is listed instead.
        ureq::Error::Io(error) => !matches!(
            error.kind(),
            Kind::ConnectionReset
                | Kind::ConnectionAborted
                | Kind::BrokenPipe
                | Kind::NotConnected
                | Kind::UnexpectedEof
                | Kind::TimedOut
                | Kind::WouldBlock
                | Kind::Interrupted
        ),
        _ => false,
    };
    let reason = chain(&error);
    if never_connected {
        Failure::Unreachable { host: format!("{}://{}", origin.scheme, origin.host), reason }
    } else {
        Failure::Broken(reason)
    }
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    // The client's name for "the system said" tells a reader nothing.
    let mut text = text.strip_prefix("io: ").unwrap_or(&text).to_owned();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let words = inner.to_string();
        if !text.contains(&words) {
            text.push_str(&format!(": {words}"));
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_resolved_against_the_address_they_came_from() {
        let from = "https://hub.example/owner/name/file?x=1";
        for (location, target) in [
            ("https://cdn.example/y?z=/a", "https://cdn.example/y?z=/a"),
            ("//cdn.example/y", "https://cdn.example/y"),
            ("/y?u=https://a/b", "https://hub.example/y?u=https://a/b"),
            ("other", "https://hub.example/owner/name/other"),
        ] {
            assert_eq!(follow(from, location).expect("a good redirect"), target);
        }
        assert_eq!(follow("http://hub.example", "x").expect("a good redirect"), "http://hub.example/x");
    }

    #[test]
    fn redirects_out_of_https_or_to_nowhere_are_refused() {
        for location in ["http://hub.example/y", "ftp://hub.example/y", "", "https://"] {
            assert!(follow("https://hub.example/x", location).is_err(), "{location:?}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url| Origin::of(url).expect("an address");
        assert_eq!(origin("https://Hub.example/x"), origin("https://hub.example:443/y?z"));
        assert_ne!(origin("https://hub.example"), origin("http://hub.example"));
        assert_ne!(origin("https://hub.example"), origin("https://hub.example.evil"));
        assert_ne!(origin("https://hub.example"), origin("https://hub.example:444"));
        // What stands before an @ is a user name, not the host.
        assert_ne!(origin("https://hub.example@evil/x"), origin("https://hub.example"));
    }

    #[test]
    fn waits_double_up_to_half_a_minute() {
        let seconds: Vec<u64> = [1, 2, 3, 5, 6, 60].into_iter().map(|n| backoff(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 16, 30, 30]);
    }

    #[test]
    fn paths_are_encoded_segment_by_segment() {
        assert_eq!(encode_path("a b/c#d?e%f"), "a%20b/c%23d%3Fe%25f");
        assert_eq!(encode_segment("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
