//! Floor 4: models behind the HTTP interfaces that existing programs speak, and a page for people.
#![forbid(unsafe_code)]
