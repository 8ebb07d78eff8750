//! The page for people: every file of it is part of the binary, and nothing is loaded from elsewhere.

use axum::{
    body::Body,
    extract::Path,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};

/// Path below `/web/`, type, content.
type File = (&'static str, &'static str, &'static str);

macro_rules! files {
    ($($path:literal: $type:literal),* $(,)?) => {
        &[$(($path, $type, include_str!(concat!("../../../web/", $path)))),*]
    };
}

const FILES: &[File] = files! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "composer.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "highlight.js": "text/javascript; charset=utf-8",
    "i18n.js": "text/javascript; charset=utf-8",
    "markdown.js": "text/javascript; charset=utf-8",
    "pictures.js": "text/javascript; charset=utf-8",
    "settings.js": "text/javascript; charset=utf-8",
    "store.js": "text/javascript; charset=utf-8",
    "tree.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "locales/en.js": "text/javascript; charset=utf-8",
    "locales/hi.js": "text/javascript; charset=utf-8",
    "locales/zh.js": "text/javascript; charset=utf-8",
};

/// Whatever an answer contains, the browser runs and loads nothing but these files and images given by hand.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page.
pub(crate) async fn index() -> Response {
    file("index.html")
}

/// One of its files.
pub(crate) async fn part(Path(path): Path<String>) -> Response {
    file(&path)
}

fn file(path: &str) -> Response {
    let Some((_, kind, content)) = FILES.iter().find(|file| file.0 == path) else {
        let mut missing = Response::new(Body::from("there is no such file\n"));
        *missing.status_mut() = StatusCode::NOT_FOUND;
        return missing;
    };
    let mut response = Response::new(Body::from(*content));
    let headers = [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        // The files change with the program, and come from near.
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
