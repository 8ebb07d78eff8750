//! `qwenkit run`: one answer, or a chat when nothing is asked and a person sits at the terminal.
//!
//! Contract: arguments are judged before a model is fetched or loaded. Not here: the chat (`chat`), the answer's way to
//! stdout (`answer`).

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    sync::Arc,
};

use clap::Args;
use qwenkit_engine::{Ask, Finish, Options, Prompt, Session, Visual};
use qwenkit_formats::Adapter as AdapterFile;
use qwenkit_models::Adapter;
use qwenkit_tensor::TokenId;
use qwenkit_text::ChatInput;
use serde_json::{Map, Value, json};

use crate::answer::{self, Show};
use crate::failure::{Interrupted, usage};
use crate::images::{self, FRAMES_PER_SECOND, Named, Shown};
use crate::opening::{self, PrefixCacheArgs, SessionArgs, SpeculateArg};
use crate::prompt::{self, Words};
use crate::sampling::SamplingArgs;
use crate::seeing::Sight;
use crate::{chat, interrupt, locate, terminal};

const EXAMPLES: &str = "\
Examples:
  qwenkit run \"Write a Python function that reverses a string\"
  qwenkit run qwen3:4b \"Why is the sky blue?\" --temperature 0
  cat report.txt | qwenkit run \"Summarise:\"
  qwenkit run ./model.gguf                  a chat; /help lists its commands
  qwenkit run ./qwen3-vl \"What is on this sign?\" --image sign.jpg
  qwenkit run --adapter my-adapter \"...\"    with a LoRA adapter, as `qwenkit tune` or PEFT writes it
  qwenkit run --model ./model.gguf --prompt-ids 1,2,3 --max-tokens 16 --temperature 0 --json

The first word is the model if it names one, else the prompt begins there; --model leaves no doubt.
Without a model the one in the store is used, or the default is fetched.";

/// Arguments of `run`.
#[derive(Args)]
#[command(after_help = EXAMPLES, override_usage = "qwenkit run [OPTIONS] [MODEL] [PROMPT]...")]
pub(crate) struct RunArgs {
    /// The model (if the first word names one), then the prompt
    #[arg(value_name = "MODEL | PROMPT")]
    words: Vec<String>,
    /// The model: a short name, a hub id, a .gguf file or a checkpoint folder
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// The prompt as token ids, with nothing added
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["system", "raw", "think", "no_think", "template_arg"])]
    prompt_ids: Vec<u32>,
    /// An image to show with the prompt (PNG, JPEG, WebP, GIF), or a folder of frames as a film; repeatable
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The model's vision tower, where it has a file of its own [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Frames of a film for each second [default: 2]
    #[arg(long, value_name = "N", value_parser = images::frames_per_second)]
    fps: Option<f32>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Tokens to generate at most [default: what the context holds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// A text that ends the answer; repeatable
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// The prompt as it is, without the model's chat template
    #[arg(long, conflicts_with_all = ["think", "no_think", "template_arg"])]
    raw: bool,
    /// A LoRA adapter of this model: a PEFT folder or a GGUF file
    #[arg(long, value_name = "PATH")]
    adapter: Option<PathBuf>,
    /// Have the model think before it answers, where its template knows how
    #[arg(long, conflicts_with = "no_think")]
    think: bool,
    /// Have the model answer without thinking, where its template knows how
    #[arg(long)]
    no_think: bool,
    /// A variable for the chat template; repeatable
    #[arg(long, value_name = "KEY=JSON", value_parser = prompt::template_arg)]
    template_arg: Vec<(String, Value)>,
    /// Print one JSON object: prompt_ids, ids, text, finish_reason and more
    #[arg(long)]
    json: bool,
    /// Log-probabilities of each token and of the N best ones (with --json)
    #[arg(long, value_name = "N", requires = "json", value_parser = clap::value_parser!(u8).range(0..=100))]
    logprobs: Option<u8>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Guesses next tokens and computes several at once; the answer is the same, sooner
    #[arg(long, value_name = "FROM", value_enum, default_value_t = SpeculateArg::Auto, help_heading = "How the model is run")]
    speculate: SpeculateArg,
    #[command(flatten)]
    prefix_cache: PrefixCacheArgs,
    #[command(flatten)]
    session: SessionArgs,
}

/// Runs the command.
pub(crate) fn run(args: &RunArgs, offline: bool) -> anyhow::Result<()> {
    let words = prompt::words(args.model.as_deref(), &args.words)?;
    let question = args.question(&words)?;
    let named = args.images(question.is_some())?;
    let adapter = args.adapter.as_deref().map(AdapterFile::open).transpose()?;
    let located = locate::locate(words.model.as_deref(), offline)?;
    interrupt::install()?;
    let sight = match (&args.mmproj, named.is_empty(), &question) {
        (None, true, Some(_)) => Sight::Text,
        (None, true, None) => Sight::where_possible(&located.files),
        (mmproj, ..) => Sight::wanted(&located.files, mmproj.as_deref())?,
    };
    let options = args.session.options(usize::MAX, args.speculate)?;
    let options = Options { prefix_cache: args.prefix_cache.cache(), ..options };
    let session = opening::open_with(&located.files, &sight, &options)?;
    let adapter = match adapter {
        Some(file) => Some(session.adapter(&file)?),
        None => None,
    };
    let kwargs = args.kwargs(&session);
    let fps = args.fps.unwrap_or(FRAMES_PER_SECOND);
    let shown = named.iter().map(|named| named.show(&session, fps)).collect::<anyhow::Result<Vec<_>>>()?;
    match question {
        Some(prompt) => args.answer_once(&session, adapter, prompt, shown, kwargs),
        None => {
            let ask = |messages: Vec<Value>, visuals: Vec<Visual>| Ask {
                visuals,
                adapter: adapter.clone(),
                ..args.ask(&session, chat_prompt(messages, kwargs.clone()))
            };
            chat::chat(&session, &located.stored.name, args.system.clone(), shown, fps, &ask)
        }
    }
}

/// What to ask, before it is known which model answers.
enum Question {
    Ids(Vec<TokenId>),
    Text(String),
}

fn chat_prompt(messages: Vec<Value>, kwargs: Map<String, Value>) -> Prompt {
    let messages = Value::Array(messages);
    Prompt::Chat(Box::new(ChatInput { messages, add_generation_prompt: true, kwargs, ..ChatInput::default() }))
}

impl RunArgs {
    /// The question, or `None` for a chat.
    fn question(&self, words: &Words) -> anyhow::Result<Option<Question>> {
        if !self.prompt_ids.is_empty() {
            prompt::no_words(words)?;
            return Ok(Some(Question::Ids(self.prompt_ids.iter().map(|&id| TokenId(id)).collect())));
        }
        if let Some(text) = prompt::with_pipe(words.prompt.clone())? {
            return Ok(Some(Question::Text(text)));
        }
        if !io::stdin().is_terminal() {
            return Err(usage(
                "there is no prompt: the command line has none and stdin is empty\nhint: qwenkit run \"...\"",
            ));
        }
        if self.json || self.raw {
            let option = if self.json { "--json" } else { "--raw" };
            return Err(usage(format!("{option} needs a prompt\nhint: qwenkit run {option} \"...\"")));
        }
        Ok(None)
    }

    /// The images, read before a model is fetched or loaded.
    fn images(&self, has_question: bool) -> anyhow::Result<Vec<Named>> {
        if self.fps.is_some() && has_question && !self.image.iter().any(|path| path.is_dir()) {
            return Err(usage(
                "--fps is for films, found none\nhint: name a folder of frames with --image, or leave --fps out",
            ));
        }
        self.image.iter().map(|path| images::open(path)).collect()
    }

    /// The template's variables. A switch that the template does not have is said to do nothing.
    fn kwargs(&self, session: &Session) -> Map<String, Value> {
        const SWITCH: &str = "enable_thinking";
        let mut kwargs: Map<String, Value> = self.template_arg.iter().cloned().collect();
        if self.think || self.no_think {
            kwargs.insert(SWITCH.to_owned(), Value::Bool(self.think));
        }
        for name in kwargs.keys() {
            if session.template().is_some_and(|template| !template.source().contains(name.as_str())) {
                terminal::note(&format!("note: this model's chat template does not use `{name}`; it changes nothing"));
            }
        }
        kwargs
    }

    fn ask(&self, session: &Session, prompt: Prompt) -> Ask {
        Ask {
            prompt,
            sampling: self.sampling.over(session.defaults()),
            max_tokens: self.max_tokens.map(|tokens| tokens as usize),
            stop: self.stop.clone(),
            logprobs: self.logprobs.map(usize::from),
            ..Ask::default()
        }
    }

    fn answer_once(
        &self,
        session: &Session,
        adapter: Option<Arc<Adapter>>,
        question: Question,
        shown: Vec<Shown>,
        kwargs: Map<String, Value>,
    ) -> anyhow::Result<()> {
        let prompt = match question {
            Question::Ids(ids) => Prompt::Ids(ids),
            Question::Text(text) if self.raw => Prompt::Text(text),
            Question::Text(text) => {
                let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
                let user = json!({ "role": "user", "content": images::content(&shown, &text) });
                chat_prompt(system.chain([user]).collect(), kwargs)
            }
        };
        let show = if self.json { Show::Nothing } else { Show::Stream };
        let visuals = images::visuals(&shown).collect();
        let reply = answer::answer(session, Ask { visuals, adapter, ..self.ask(session, prompt) }, show)?;
        if self.json {
            let mut object = reply.to_json(session.tokenizer());
            if !shown.is_empty() {
                object["image_tokens"] = shown.iter().map(|shown| shown.picture.tokens).sum::<usize>().into();
            }
            terminal::print_json(&object)?;
        } else {
            answer::remark(session, &reply.summary);
        }
        match reply.summary.finish {
            Finish::Cancelled => Err(Interrupted.into()),
            _ => Ok(()),
        }
    }
}
