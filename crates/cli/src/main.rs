//! `qwenkit`: one program that runs Qwen models on the machine at hand.
//!
//! Contract: data goes to stdout and everything else to stderr; exit codes are 0 done, 1 failed, 2 wrong usage.
#![forbid(unsafe_code)]

fn main() {}
