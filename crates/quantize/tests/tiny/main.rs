//! The tiny models of all architectures: converted, quantised, loaded again.

mod guessing;
mod kinds;
mod models;
mod steps;
mod twins;
