//! Images in requests: taken out of their wrapping, held to limits, decoded one at a time and made visuals of the model.
//!
//! Contract: nothing is fetched, from the network or from this machine; an image is in no log and in no message; memory is
//! bounded however many ask at once. Not here: what an image's bytes mean (`qwenkit-media`), what a model sees.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use axum::http::StatusCode;
use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use qwenkit_engine::{Error as EngineError, Visual};
use qwenkit_media::{Limits as MediaLimits, decode};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    error::ApiError,
    fields::{Fields, wrong},
    models::ServedModel,
};

/// How much a request's images may be.
#[derive(Clone, Copy, Debug)]
pub struct ImageLimits {
    /// Images of a conversation.
    pub count: usize,
    /// Bytes of an image's file.
    pub file_bytes: usize,
    /// Pixels of an image.
    pub pixels: u64,
    /// Bytes that the files and patches of all requests under way may take together.
    pub held_bytes: usize,
}

impl Default for ImageLimits {
    fn default() -> ImageLimits {
        ImageLimits { count: 64, file_bytes: 20 << 20, pixels: 32 << 20, held_bytes: 1 << 30 }
    }
}

/// Permits count pieces of this many bytes.
const PIECE_BYTES: usize = 1 << 16;
/// Requests whose images are decoded or wait for it. The server's threads for such work are 512.
const LINE_MAX: usize = 64;
/// What OpenAI's `detail: low` brings an image to.
const LOW_DETAIL_PIXELS: usize = 512 * 512;
/// Clients differ in padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Where images become visuals, for all models of a server.
pub(crate) struct ImageRoom {
    limits: ImageLimits,
    /// Pieces of memory that are free for files and patches.
    free: Arc<Semaphore>,
    /// Held while an image is decoded: pixels take more than anything else.
    turn: Mutex<()>,
    /// Places for requests that decode or wait for their turn, so that they never fill the threads that others need too.
    line: Semaphore,
}

impl ImageRoom {
    pub(crate) fn new(limits: ImageLimits) -> ImageRoom {
        let pieces = (limits.held_bytes / PIECE_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        ImageRoom {
            limits,
            free: Arc::new(Semaphore::new(pieces)),
            turn: Mutex::new(()),
            line: Semaphore::new(LINE_MAX),
        }
    }
}

/// An image of a request.
struct Given {
    /// Where it stands in the request.
    at: String,
    file: Vec<u8>,
    most_pixels: Option<usize>,
}

/// The images of a conversation, in order.
#[derive(Clone, Default)]
pub(crate) struct Images(Arc<Found>);

#[derive(Default)]
struct Found {
    given: Vec<Given>,
    /// What their files take.
    memory: Memory,
}

impl fmt::Debug for Images {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} images", self.0.given.len())
    }
}

/// Collects the images of a request for a model while its messages are read.
pub(crate) struct Gathering<'a> {
    model: &'a ServedModel,
    found: Found,
}

impl<'a> Gathering<'a> {
    pub(crate) fn new(model: &'a ServedModel) -> Gathering<'a> {
        Gathering { model, found: Found::default() }
    }

    /// What was found.
    pub(crate) fn done(self) -> Images {
        Images(Arc::new(self.found))
    }

    /// Refuses an image at `at` if the model reads text only, or there are too many.
    pub(crate) fn admit(&self, at: &str) -> Result<(), ApiError> {
        if self.model.session.pictures().is_err() {
            let why = match self.model.session.vision_is_missing() {
                true => "was opened without its vision tower, so it reads text only",
                false => "reads text only",
            };
            let message = format!("`{at}` is an image, and {} {why}", self.model.name);
            return Err(ApiError::invalid(at, message).with_code("unsupported_content"));
        }
        let most = self.model.images.limits.count;
        if self.found.given.len() >= most {
            let message = format!("`{at}` is one image too many: a conversation may have {most}");
            return Err(ApiError::invalid(at, message).with_code("too_many_images"));
        }
        Ok(())
    }

    /// Takes the image of a data URL at `at`; returns the part of a message that stands for it.
    pub(crate) fn url(&mut self, at: &str, url: &str, detail: Option<(String, Value)>) -> Result<Value, ApiError> {
        self.admit(at)?;
        let most_pixels = most_pixels(detail)?;
        let file = self.base64(at, of_data_url(at, url)?)?;
        self.found.given.push(Given { at: at.to_owned(), file, most_pixels });
        Ok(part())
    }

    /// Takes an image in base64 at `at`, bare or as a data URL.
    pub(crate) fn bare(&mut self, at: &str, text: &str) -> Result<Value, ApiError> {
        let has_scheme = text.get(..16).unwrap_or(text).contains(':');
        if has_scheme {
            return self.url(at, text, None);
        }
        self.admit(at)?;
        let file = self.base64(at, text)?;
        self.found.given.push(Given { at: at.to_owned(), file, most_pixels: None });
        Ok(part())
    }

    fn base64(&mut self, at: &str, text: &str) -> Result<Vec<u8>, ApiError> {
        let room = &self.model.images;
        let (bytes, most) = (text.len() / 4 * 3, room.limits.file_bytes);
        if bytes > most + 3 {
            let message = format!("`{at}` is an image of {bytes} bytes, expected at most {most}");
            return Err(ApiError::invalid(at, message).with_code("image_too_large"));
        }
        self.found.memory.hold(room, bytes + 3, at, 0)?;
        let broken = |error| ApiError::invalid(at, format!("`{at}` is no base64: {error}"));
        // Some encoders break lines.
        match text.contains(|c: char| c.is_ascii_whitespace()) {
            true => {
                let mut for_now = Memory::default();
                for_now.hold(room, text.len(), at, self.found.memory.pieces())?;
                let packed: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
                BASE64.decode(packed).map_err(broken)
            }
            false => BASE64.decode(text).map_err(broken),
        }
    }

    /// The image of a part in any of OpenAI's forms, whose `type` is `kind`.
    pub(crate) fn part(&mut self, fields: &mut Fields, kind: &str) -> Result<Value, ApiError> {
        // The model is named first: what it cannot have need not be well formed.
        self.admit(&fields.at("type"))?;
        let name = if kind == "image" { "image" } else { "image_url" };
        if kind == "input_image" && fields.peek(name).is_none_or(Value::is_null) {
            fields.unsupported("file_id", &[], "send the image itself, as a data URL in `image_url`")?;
        }
        let at = fields.at(name);
        let value = fields.take(name);
        let outer = fields.take("detail").map(|detail| (fields.at("detail"), detail));
        match fields.required(name, value)? {
            Value::String(url) if kind == "image" => self.bare(&at, &url),
            Value::String(url) => self.url(&at, &url, outer),
            value @ Value::Object(_) => {
                let mut inner = Fields::new(value, at)?;
                let url = inner.string("url")?;
                let url = inner.required("url", url)?;
                let detail = inner.take("detail").map(|detail| (inner.at("detail"), detail));
                let at = inner.at("url");
                inner.finish()?;
                self.url(&at, &url, detail.or(outer))
            }
            other => Err(wrong(&at, &other, "a data URL, or an object with `url`")),
        }
    }
}

/// The part of a message that stands for an image.
fn part() -> Value {
    json!({ "type": "image" })
}

fn most_pixels(detail: Option<(String, Value)>) -> Result<Option<usize>, ApiError> {
    let Some((at, detail)) = detail else { return Ok(None) };
    match detail.as_str() {
        Some("low") => Ok(Some(LOW_DETAIL_PIXELS)),
        Some("auto" | "high" | "original") => Ok(None),
        _ => Err(wrong(&at, &detail, "auto, low, high or original")),
    }
}

/// The base64 of a data URL.
fn of_data_url<'a>(at: &str, url: &'a str) -> Result<&'a str, ApiError> {
    let example = "expected the image itself, as data:image/png;base64,...";
    let refused = |what: String| Err(ApiError::invalid(at, format!("`{at}` {what}; {example}")));
    let scheme = url.split_once(':').map(|(scheme, _)| scheme.to_ascii_lowercase());
    match scheme.as_deref() {
        Some("data") => {}
        Some(scheme @ ("http" | "https" | "ftp")) => {
            return refused(format!("is an {scheme} URL, and this server fetches nothing"));
        }
        Some("file") => return refused("is a file URL, and this server reads no files for its clients".to_owned()),
        _ => return refused("is no URL that this server takes".to_owned()),
    }
    let Some((head, data)) = url.split_once(',') else {
        return refused("is a data URL without a comma before its data".to_owned());
    };
    let head = head.to_ascii_lowercase();
    let mut words = head.trim_start_matches("data:").split(';');
    let kind: String = words.next().unwrap_or_default().chars().take(40).collect();
    if !(kind.is_empty() || kind.starts_with("image/") || kind == "application/octet-stream") {
        return refused(format!("is a data URL of {kind:?}"));
    }
    if !words.any(|word| word.trim() == "base64") {
        return refused("is a data URL that is not in base64".to_owned());
    }
    Ok(data)
}

/// Visuals for a session, and the memory that they may take, which is free again when this is dropped.
#[derive(Default)]
pub(crate) struct Held {
    pub(crate) visuals: Vec<Visual>,
    pub(crate) memory: Memory,
}

/// Memory taken for images, free again when this is dropped.
#[derive(Default)]
pub(crate) struct Memory(Option<OwnedSemaphorePermit>);

impl Images {
    /// Makes visuals of all images, away from the threads that serve connections.
    ///
    /// # Errors
    /// When one is none, too large or broken, they are too many for the context, or memory for them is not free now.
    pub(crate) fn held(&self, model: &ServedModel) -> Result<Held, ApiError> {
        let mut held = Held::default();
        let Found { given, memory } = &*self.0;
        if given.is_empty() {
            return Ok(held);
        }
        let room = &model.images;
        let busy = |_| busy("too many requests wait for their images to be decoded");
        let _place = room.line.try_acquire().map_err(busy)?;
        let pictures = model.session.pictures().map_err(|error| ApiError::internal(error.to_string()))?;
        let (side, file_bytes) = (MediaLimits::default().side, room.limits.file_bytes as u64);
        let limits = MediaLimits { file_bytes, pixels: room.limits.pixels, side };
        let (mut tokens, context_tokens) = (0, model.session.info().context_tokens);
        for Given { at, file, most_pixels } in given {
            let broken =
                |error: EngineError| ApiError::invalid(at, format!("`{at}`: {error}")).with_code("invalid_image");
            let _turn = room.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let rgb = decode(file, &limits).map_err(|error| broken(error.into()))?;
            let picture = pictures.image(&rgb, *most_pixels).map_err(broken)?;
            tokens += picture.tokens;
            if tokens >= context_tokens {
                let message = format!(
                    "`{at}`: the images up to here take {tokens} tokens and the context holds {context_tokens}; \
                     send fewer or smaller ones, or set `detail` to low"
                );
                return Err(ApiError::invalid(at, message).with_code("context_length_exceeded"));
            }
            let bytes: usize = picture.visuals.iter().map(|v| size_of_val(v.pixels().values.as_slice())).sum();
            held.memory.hold(room, bytes, at, memory.pieces())?;
            held.visuals.extend(picture.visuals);
        }
        Ok(held)
    }
}

impl Memory {
    fn pieces(&self) -> usize {
        self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits)
    }

    /// Takes more, for a request that holds `beside` pieces elsewhere.
    fn hold(&mut self, room: &ImageRoom, bytes: usize, at: &str, beside: usize) -> Result<(), ApiError> {
        let all = room.limits.held_bytes / PIECE_BYTES;
        let pieces = bytes.div_ceil(PIECE_BYTES);
        let own = self.pieces() + beside;
        if own + pieces > all {
            let message = format!(
                "`{at}`: the images up to here take {} bytes of memory and a request may have {}; send fewer or smaller ones",
                (own + pieces) * PIECE_BYTES,
                all * PIECE_BYTES
            );
            return Err(ApiError::invalid(at, message).with_code("image_too_large"));
        }
        let wanted = u32::try_from(pieces).unwrap_or(u32::MAX);
        let Ok(more) = Arc::clone(&room.free).try_acquire_many_owned(wanted) else {
            return Err(busy("the images of other requests take all the memory for images"));
        };
        match &mut self.0 {
            Some(memory) => memory.merge(more),
            None => self.0 = Some(more),
        }
        Ok(())
    }
}

/// What a request is told that may come again in a while.
fn busy(why: &str) -> ApiError {
    let message = format!("{why}; try again in a while");
    let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
    ApiError { retry_after_s: Some(5), ..error.with_code("queue_full") }
}

/// A message's content while it is read: text alone stays text, with a line break between its parts.
#[derive(Default)]
pub(crate) struct Content {
    parts: Vec<Value>,
    has_images: bool,
}

impl Content {
    pub(crate) fn text(&mut self, text: String) {
        self.parts.push(json!({ "type": "text", "text": text }));
    }

    pub(crate) fn image(&mut self, part: Value) {
        self.has_images = true;
        self.parts.push(part);
    }

    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// For a template.
    pub(crate) fn value(self) -> Value {
        if self.has_images {
            return Value::Array(self.parts);
        }
        let texts: Vec<&str> = self.parts.iter().filter_map(|part| part["text"].as_str()).collect();
        Value::String(texts.join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_urls_give_their_data_and_others_are_refused_by_kind() {
        for url in ["data:image/png;base64,QUJD", "DATA:;BASE64,QUJD", "data:image/jpeg;name=x.jpg;base64,QUJD"] {
            assert_eq!(of_data_url("u", url).unwrap(), "QUJD", "{url}");
        }
        for (url, told) in [
            ("https://example.com/cat.png", "https URL, and this server fetches nothing"),
            ("HTTP://example.com/cat.png", "http URL"),
            ("file:///etc/passwd", "file URL"),
            ("/etc/passwd", "no URL"),
            ("cat.png", "no URL"),
            ("", "no URL"),
            ("data:image/png;base64", "without a comma"),
            ("data:image/png,abc", "not in base64"),
            ("data:text/html;base64,QUJD", "text/html"),
        ] {
            let message = of_data_url("u", url).unwrap_err().message;
            assert!(message.contains(told) && message.contains("data:image/png;base64"), "{url}: {message}");
        }
    }

    #[test]
    fn memory_is_held_until_it_is_let_go() {
        let room = ImageRoom::new(ImageLimits { held_bytes: 4 * PIECE_BYTES, ..ImageLimits::default() });
        let (mut first, mut second) = (Memory::default(), Memory::default());
        first.hold(&room, PIECE_BYTES, "a", 0).unwrap();
        first.hold(&room, 2 * PIECE_BYTES - 1, "b", 0).unwrap();
        assert_eq!(first.hold(&room, 2 * PIECE_BYTES, "c", 0).unwrap_err().code, Some("image_too_large"));
        assert_eq!(second.hold(&room, PIECE_BYTES, "d", 4).unwrap_err().code, Some("image_too_large"));
        assert_eq!(second.hold(&room, 2 * PIECE_BYTES, "e", 0).unwrap_err().status, StatusCode::TOO_MANY_REQUESTS);
        drop(first);
        second.hold(&room, 4 * PIECE_BYTES, "f", 0).unwrap();
    }

    #[test]
    fn text_alone_stays_text() {
        let mut content = Content::default();
        content.text("a".to_owned());
        content.text("b".to_owned());
        assert_eq!(content.value(), "a\nb");
        let mut content = Content::default();
        content.text("a".to_owned());
        content.image(part());
        assert_eq!(content.value(), json!([{ "type": "text", "text": "a" }, { "type": "image" }]));
    }
}
