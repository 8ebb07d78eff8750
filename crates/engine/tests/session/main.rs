//! Sessions over tiny checkpoints: text in, text out, with everything that can stop, cut, share or refuse an answer.

mod adapters;
mod answers;
mod fixture;
mod guard;
mod guessing;
mod images;
mod model_text;
mod prompts;
mod readings;
mod sharing;
