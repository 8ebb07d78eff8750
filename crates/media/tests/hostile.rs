//! No file makes a decoder panic, take memory beyond its limits, or give something else than pixels or an error.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use qwenkit_media::{Error, Limits, decode};

/// Small ones, so that damage reaches every part.
fn forms() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images/forms");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("fixtures").map(|e| e.expect("an entry").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension != "safetensors"));
    paths.sort();
    let name = |path: &PathBuf| path.file_name().expect("a name").to_string_lossy().into_owned();
    paths.iter().map(|path| (name(path), std::fs::read(path).expect("a fixture"))).collect()
}

fn small() -> Limits {
    Limits { file_bytes: 1 << 20, pixels: 1 << 16, side: 4096 }
}

/// Decodes, and checks what comes out.
fn judge(bytes: &[u8]) {
    match decode(bytes, &small()) {
        Ok(image) => {
            assert!(image.width * image.height <= 1 << 16);
            assert_eq!(image.values.len(), image.width * image.height * 3);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[test]
fn files_cut_anywhere_are_refused_or_whole() {
    for (name, bytes) in forms() {
        let whole = decode(&bytes, &small()).expect(&name);
        for cut in 0..bytes.len() {
            if let Ok(image) = decode(&bytes[..cut], &small()) {
                // Only what stands behind the pixels may be missing: they are all there.
                let is_turned = name.starts_with("turned");
                assert!(is_turned || image == whole, "{name}, {cut} of {} bytes", bytes.len());
            }
        }
    }
}

#[test]
fn headers_that_promise_more_than_the_file_can_hold_are_refused() {
    let jpeg_of = |marker: u8, width: u16, height: u16| {
        let mut bytes = b"\xff\xd8\xff".to_vec();
        bytes.extend([marker, 0, 17, 8]);
        bytes.extend([height.to_be_bytes(), width.to_be_bytes()].concat());
        bytes.extend([3, 1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1]);
        bytes
    };
    for marker in [0xc0, 0xc2] {
        let error = decode(&jpeg_of(marker, 8000, 8000), &Limits::default()).expect_err("a bomb");
        assert!(matches!(error, Error::CutShort { .. }), "{error}");
        let error = decode(&jpeg_of(marker, 65_535, 65_535), &Limits::default()).expect_err("a bomb");
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
        let error = decode(&jpeg_of(marker, 60, 0), &Limits::default()).expect_err("no rows");
        assert!(matches!(error, Error::Narrow { .. }), "{error}");
    }
    let mut png = forms().into_iter().find(|(name, _)| name == "interlaced.png").expect("a fixture").1;
    png[16..24].copy_from_slice(&[0, 0, 0x1f, 0x40, 0, 0, 0x1f, 0x40]);
    assert!(decode(&png, &Limits::default()).is_err());
    png[16..24].copy_from_slice(&[0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff]);
    assert!(decode(&png, &Limits::default()).is_err());
    let gif = [&b"GIF89a"[..], &[0xff, 0xff, 0xff, 0xff, 0, 0, 0], &[0x2c, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 2]]
        .concat();
    assert!(matches!(decode(&gif, &Limits::default()), Err(Error::TooLarge { .. })));
    // A canvas of one pixel around frames that state more.
    let chunk = |name: &[u8; 4], data: &[u8]| [name, &(data.len() as u32).to_le_bytes()[..], data].concat();
    let lossy = chunk(b"VP8 ", &[0x10, 0, 0, 0x9d, 1, 0x2a, 0xff, 0x3f, 0xff, 0x3f, 0, 0]);
    let lossless = chunk(b"VP8L", &[0x2f, 0xff, 0xff, 0xff, 0x0f, 0]);
    let animated = |frame: &[u8]| chunk(b"ANMF", &[&[0; 16], frame].concat());
    for (flags, frame) in [(0, &lossy), (0, &lossless), (2, &animated(&lossy)), (2, &animated(&lossless))] {
        let canvas = chunk(b"VP8X", &[flags, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let file = chunk(b"RIFF", &[b"WEBP", &canvas[..], frame].concat());
        let error = decode(&file, &Limits::default()).expect_err("a bomb");
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
}

#[test]
fn limits_are_said() {
    let (_, bytes) = forms().into_iter().find(|(name, _)| name == "444.jpg").expect("a fixture");
    for (limits, said) in [
        (Limits { file_bytes: 100, ..small() }, "expected at most 100"),
        (Limits { pixels: 1000, ..small() }, "61 x 47 pixels, expected sides of at most 4096 and at most 1000 pixels"),
        (Limits { side: 60, ..small() }, "sides of at most 60"),
    ] {
        let error = decode(&bytes, &limits).expect_err(said).to_string();
        assert!(error.contains(said) && error.contains("hint: "), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_give_pixels_or_an_error(
        which in any::<prop::sample::Index>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let forms = forms();
        let mut bytes = which.get(&forms).1.clone();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        judge(&bytes);
    }

    #[test]
    fn anything_behind_a_signature_gives_pixels_or_an_error(
        which in 0..4_usize,
        tail in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let start: [&[u8]; 4] =
            [b"\xff\xd8\xff\xc0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8L"];
        judge(&[start[which], &tail].concat());
    }
}
