//! What is no image, or one that would take the machine, is refused with words, and orientation is carried out.

use std::path::Path;

use proptest::prelude::*;
use qwenkit_media::{Error, decode};

fn image(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/images").join(name)).expect("an image")
}

#[test]
fn other_files_are_refused_by_kind() {
    for bytes in [&b""[..], b"text", b"BM\0\0\0\0\0\0", b"%PDF-1.7"] {
        let error = decode(bytes).expect_err("no image");
        assert!(matches!(error, Error::Kind { .. }) && error.to_string().contains("expected PNG"), "{error}");
    }
}

#[test]
fn huge_sides_are_refused_before_decoding() {
    let mut png = image("tiny.png");
    // Width and height stand behind the signature, the length and the name of the first chunk; the checksum follows.
    png[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
    let end = 29;
    let sum = crc(&png[12..end]);
    png[end..end + 4].copy_from_slice(&sum.to_be_bytes());
    let error = decode(&png).expect_err("65,536 x 65,536");
    assert!(matches!(error, Error::TooLarge { width: 65_536, height: 65_536, .. }), "{error}");
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |sum, &byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum, _| if sum & 1 == 1 { (sum >> 1) ^ 0xEDB8_8320 } else { sum >> 1 })
    })
}

#[test]
fn a_camera_held_sideways_is_turned_upright() {
    let plain = image("jpeg.jpg");
    // Behind the two bytes that begin the file: a segment with one entry of EXIF, orientation 6.
    let mut exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0".to_vec();
    let length = (exif.len() + 2) as u16;
    let mut turned = plain[..2].to_vec();
    turned.extend([0xFF, 0xE1]);
    turned.extend(length.to_be_bytes());
    turned.append(&mut exif);
    turned.extend(&plain[2..]);
    let (plain, turned) = (decode(&plain).expect("an image"), decode(&turned).expect("an image"));
    assert_eq!((turned.width, turned.height), (plain.height, plain.width));
    // A quarter turn clockwise: what was at the bottom left is at the top left.
    assert_eq!(turned.values[..3], plain.values[(plain.height - 1) * plain.width * 3..][..3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_files_never_panic(name in prop::sample::select(vec!["tiny.png", "jpeg.jpg", "gray.png"]),
                                 changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
                                 keep in any::<prop::sample::Index>(), cut in any::<bool>()) {
        let mut bytes = image(name);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        if let Ok(image) = decode(&bytes) {
            prop_assert_eq!(image.values.len(), image.width * image.height * 3);
        }
    }
}
