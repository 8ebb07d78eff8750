//! Which pages may ask: the server's own, and those of origins that are named.
//!
//! A browser lets any page send requests to this machine. So a request that carries another page's origin is refused
//! unless the origin is allowed, and a server that needs no key answers only to this machine's own names, whatever name a
//! page has tricked the browser into.

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use crate::{app::App, error::ApiError};

/// Refuses requests of pages that may not ask.
pub(crate) fn check(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    let forbidden = |message: String| {
        Err(ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).with_code("origin_not_allowed"))
    };
    if app.is_private && !is_local(host) {
        let shown: String = host.chars().take(80).collect();
        return forbidden(format!(
            "the request is for the host {shown:?}, and this server has no key and answers to 127.0.0.1 and localhost alone"
        ));
    }
    let Some(origin) = text(header::ORIGIN) else { return Ok(()) };
    let is_own = origin.split_once("://").is_some_and(|(_, rest)| rest == host);
    if is_own || app.origins.iter().any(|allowed| allowed == "*" || allowed == origin) {
        return Ok(());
    }
    let shown: String = origin.chars().take(80).collect();
    forbidden(format!("pages of {shown:?} may not ask this server; `serve --cors {shown}` lets them"))
}

/// Whether a `Host` names this machine itself.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Tells browsers which pages may read the answers.
pub(crate) fn cors(app: &App) -> CorsLayer {
    if app.origins.is_empty() {
        return CorsLayer::new();
    }
    let origins = match app.origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(app.origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok())),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // The clients' libraries send headers of their own, and add new ones.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED)
}

/// What pages may read of an answer beside its body.
const EXPOSED: [HeaderName; 8] = [
    HeaderName::from_static("x-request-id"),
    header::RETRY_AFTER,
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Whether a text is an origin as browsers send it: a scheme, a host and perhaps a port; or `*` for all.
pub(crate) fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return text == "*" };
    let is_host = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.:[]_".contains(&b);
    let is_scheme = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    !scheme.is_empty() && scheme.bytes().all(is_scheme) && !host.is_empty() && host.bytes().all(is_host)
}

#[cfg(test)]
mod tests {
    use super::{is_local, is_origin};

    #[test]
    fn origins_are_what_browsers_send() {
        for good in ["*", "https://shop.example", "http://localhost:3000", "http://[::1]:80", "chrome-extension://abc"]
        {
            assert!(is_origin(good), "{good}");
        }
        for bad in
            ["", "shop.example", "https://", "https://shop.example/", "https://a b", "https://Shop.example", "://x"]
        {
            assert!(!is_origin(bad), "{bad}");
        }
    }

    #[test]
    fn local_names_are_local() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:8080"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["", "example.com", "127.0.0.1.example.com", "localhost.example.com:80", "192.168.0.2", "[fe80::1]"]
        {
            assert!(!is_local(host), "{host}");
        }
    }
}
