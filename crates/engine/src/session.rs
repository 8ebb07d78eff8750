//! A session: a model with its text side and an engine; prompts in, pieces of text out.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use qwenkit_formats::{Adapter as AdapterFile, ModelFiles};
use qwenkit_kernels::{Compute, Isa, PAGE_TOKENS};
use qwenkit_media::Processor;
use qwenkit_models::{Adapter, Buffers, Error as ModelError, LoadEvent, Model, ModelState, Plan, Tower, arch};
use qwenkit_tensor::TokenId;
use qwenkit_text::{
    ChatInput, ChatPrompt, ChatTemplate, Form, Grammar, GrammarFactory, Opening, SpecialTokens, StreamDecoder,
    Tokenizer, encode_chat,
};

use crate::{
    answer::{self, Answer, Transcript, TranscriptPlan},
    disk::{DiskPages, PrefixCache},
    engine::{Canceller, Engine},
    error::Error,
    eyes::Eyes,
    held::Hold,
    load::Load,
    memory,
    model_text::{ModelText, text_of},
    pictures::Pictures,
    processor::image_processor,
    random::Random,
    request::{Goal, Priority, Request},
    runner::{ModelRunner, Slots},
    sampler::Sampling,
    scheduler::Scheduler,
    sequence::Listener,
    speculate::Speculate,
    vision::{Placed, VisionInfo, Visual},
};

/// How a model is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Threads that compute.
    pub threads: usize,
    /// The instruction set; must be available.
    pub isa: Isa,
    /// Tokens of context, which all requests share; the model's own where absent, less if memory is short.
    pub context_tokens: Option<usize>,
    /// Requests that may wait for their turn.
    pub max_waiting: usize,
    /// Whether tokens are guessed ahead.
    pub speculate: Speculate,
    /// Where beginnings of prompts are kept for the next time, if anywhere.
    pub prefix_cache: Option<PrefixCache>,
}

/// A model ready to answer.
pub struct Session {
    engine: Engine,
    text: ModelText,
    plan: Plan,
    info: Info,
    origin: String,
    /// A reranker's rows of yes and no, where it has no other head.
    judge: Option<Vec<f32>>,
    /// What is said of an image where there is no tower.
    blind: fn(std::path::PathBuf, &'static str) -> ModelError,
    /// By what numbers images are cut, where the model sees.
    processor: Option<Processor>,
    /// Made when the first answer is held to a form.
    grammars: OnceLock<GrammarFactory>,
    /// What was found of the model's block for guesses, where it is not used.
    block_gap: Option<String>,
    /// What the folder of kept beginnings had of this model.
    kept_tokens: Option<usize>,
}

/// What a session runs.
#[derive(Clone, Debug)]
pub struct Info {
    /// The architecture, as `model_type` has it.
    pub architecture: &'static str,
    /// Layers.
    pub layers: usize,
    /// D
    pub width: usize,
    /// V
    pub vocab: usize,
    /// Elements of all tensors in the file.
    pub parameters: u64,
    /// Bytes of the weights in memory.
    pub weight_bytes: usize,
    /// Bytes of weights read for each generated token.
    pub bytes_per_token: usize,
    /// Of these, the output head's. Where only the best tokens are wanted, less of it may be read: `Load` has how much was.
    pub head_bytes: usize,
    /// Tokens of context in force.
    pub context_tokens: usize,
    /// Tokens of context that the model was made for.
    pub model_context_tokens: usize,
    /// Bytes of cache for each token of context.
    pub kv_bytes_per_token: usize,
    /// The instruction set in use.
    pub isa: Isa,
    /// Threads in use.
    pub threads: usize,
    /// Whether the model has a chat template.
    pub has_template: bool,
    /// Whether the model has an output head, so that it answers.
    pub has_head: bool,
}

/// A prompt.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// A conversation, through the model's template; what people wrote cannot spell control tokens.
    Chat(Box<ChatInput>),
    /// Token ids as they are.
    Ids(Vec<TokenId>),
    /// Text as it is; control tokens that it spells are control tokens.
    Text(String),
}

impl Default for Prompt {
    fn default() -> Prompt {
        Prompt::Ids(Vec::new())
    }
}

/// A question to a session.
#[derive(Default)]
pub struct Ask {
    /// The prompt.
    pub prompt: Prompt,
    /// Images and films in it, in order. Chats and texts have one placeholder for each, which becomes as many as it needs;
    /// ids have them all.
    pub visuals: Vec<Visual>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens to generate at most; what the context holds where absent.
    pub max_tokens: Option<usize>,
    /// Tokens to generate at least, unless the form of the answer ends it.
    pub min_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Log-probabilities wanted: of each token and of so many best ones.
    pub logprobs: Option<usize>,
    /// The same of the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
    /// Goes on past the model's own end.
    pub ignore_stop_tokens: bool,
    /// Tokens that end the answer beside the model's own.
    pub stop_tokens: Vec<TokenId>,
    /// Who goes first.
    pub priority: Priority,
    /// What the answer is held to.
    pub hold: Hold,
    /// The adapter that answers, from `Session::adapter`.
    pub adapter: Option<Arc<Adapter>>,
}

impl Session {
    /// Loads the model in `files` and starts its engine.
    ///
    /// # Errors
    /// When the files are no whole model with its tokenizer, or memory is short.
    pub fn open(files: &ModelFiles, options: &Options, progress: &mut dyn FnMut(LoadEvent)) -> Result<Session, Error> {
        Session::open_as(files, None, options, progress)
    }

    /// As `open`, with the model's vision tower: that of `mmproj` where it is given, else the checkpoint's own.
    ///
    /// # Errors
    /// As `open`, and when there is no tower, another model's, or nothing that says how images become patches.
    pub fn open_seeing(
        files: &ModelFiles,
        mmproj: Option<&ModelFiles>,
        options: &Options,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Session, Error> {
        Session::open_as(files, Some(mmproj), options, progress)
    }

    /// `tower`: whether to see, and with what file beside the model's.
    fn open_as(
        files: &ModelFiles,
        tower: Option<Option<&ModelFiles>>,
        options: &Options,
        progress: &mut dyn FnMut(LoadEvent),
    ) -> Result<Session, Error> {
        let tower_bytes = tower.flatten().map_or(0, ModelFiles::size_bytes);
        memory::check_weights(files.size_bytes() + tower_bytes, memory::available_memory_bytes())?;
        let text = text_of(files)?;
        let processor = tower.map(|mmproj| image_processor(files, mmproj)).transpose()?;
        if options.speculate == Speculate::Mtp {
            refuse_without_block(files)?;
        }
        let compute = Compute::new(options.threads, options.isa);
        let model = match options.speculate.asks_block() {
            true => Model::load_guessing(files, &compute, progress)?,
            false => Model::load(files, &compute, progress)?,
        };
        let eyes = match tower {
            None => None,
            Some(mmproj) => Some(eyes(&model, files, mmproj, &compute, progress)?),
        };
        let (plan, kv_type) = (model.plan(), model.kv_type());
        let available = memory::available_memory_bytes();
        let context_tokens = memory::context_tokens(plan, kv_type, options.context_tokens, available)?;
        let pages = context_tokens.div_ceil(PAGE_TOKENS);
        let slots = memory::slots(plan);
        let state = ModelState::new(plan, kv_type, pages, slots.map_or(0, Slots::total))?;
        let info = Info {
            architecture: plan.architecture,
            layers: plan.layers.len(),
            width: plan.width,
            vocab: plan.vocab,
            parameters: files.tensors().iter().map(|t| t.shape.iter().product::<usize>() as u64).sum(),
            weight_bytes: model.weight_bytes() + eyes.as_ref().map_or(0, Eyes::weight_bytes),
            bytes_per_token: model.bytes_per_token(),
            head_bytes: model.head_bytes(),
            context_tokens,
            model_context_tokens: plan.context_tokens,
            kv_bytes_per_token: ModelState::page_bytes(plan, kv_type) / PAGE_TOKENS,
            isa: compute.isa(),
            threads: compute.pool().threads(),
            has_template: text.template.is_some(),
            has_head: !plan.headless,
        };
        let blind = match plan.sight {
            Some(_) => |path, architecture| ModelError::NoTower { path, architecture },
            None => |path, architecture| ModelError::Blind { path, architecture },
        };
        let block_gap = options.speculate.asks_block().then(|| arch::mtp_gap(files, plan)).flatten();
        let plan = plan.clone();
        let judge = model.judge().map(<[f32]>::to_vec);
        let buffers = if plan.mtp.is_some() { Buffers::keeping_states() } else { Buffers::default() };
        let mut runner = ModelRunner { model, compute, state, slots, buffers, guess_logits: Vec::new(), eyes };
        let kept = match &options.prefix_cache {
            Some(cache) => {
                let sizes = [ModelState::page_bytes(&plan, kv_type), ModelState::slot_bytes(&plan)];
                Some(DiskPages::open(cache, runner.identity(files), sizes)?)
            }
            None => None,
        };
        let mut scheduler = Scheduler::new(runner, pages, text.tokenizer.vocab_size(), options.speculate);
        let kept_tokens = kept.as_ref().map(|kept| kept.pages() * PAGE_TOKENS);
        kept.into_iter().for_each(|kept| scheduler.keep_in(kept));
        let engine = Engine::start(scheduler, options.max_waiting)?;
        let origin = files.path().display().to_string();
        let grammars = OnceLock::new();
        Ok(Session { engine, text, plan, info, origin, judge, blind, processor, grammars, block_gap, kept_tokens })
    }

    /// Tokens of prompts that were found in the folder of kept beginnings, where there is one.
    pub fn kept_tokens(&self) -> Option<usize> {
        self.kept_tokens
    }

    /// What was found of a block that guesses tokens which would be asked if it were whole, in words.
    pub fn block_gap(&self) -> Option<&str> {
        self.block_gap.as_deref()
    }

    /// What visuals prompts may have; none where absent.
    pub fn vision(&self) -> Option<&VisionInfo> {
        self.engine.vision()
    }

    /// Makes visuals of images; none where the session reads text only.
    ///
    /// # Errors
    /// When it does: says what is missing.
    pub fn pictures(&self) -> Result<Pictures<'_>, Error> {
        match (&self.processor, self.vision()) {
            (Some(processor), Some(vision)) => Ok(Pictures { processor, vision }),
            _ => Err(self.blindness()),
        }
    }

    /// Whether the model would see if it had been opened with its tower.
    pub fn vision_is_missing(&self) -> bool {
        self.vision().is_none() && matches!(self.blindness(), Error::Model(ModelError::NoTower { .. }))
    }

    fn blindness(&self) -> Error {
        (self.blind)((&self.origin).into(), self.info.architecture).into()
    }

    /// What this session runs.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.text.tokenizer
    }

    /// The model's chat template.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.text.template.as_ref()
    }

    /// The sampling that the model's makers recommend.
    pub fn defaults(&self) -> &Sampling {
        &self.text.defaults
    }

    /// The tokens that end an answer.
    pub fn stop_tokens(&self) -> &[TokenId] {
        &self.text.stop_tokens
    }

    /// An adapter from its file, ready for questions. Those under different adapters, and under none, are answered together.
    ///
    /// # Errors
    /// When it is another model's, or a classifier's: its weights were trained for labels, not for answers.
    pub fn adapter(&self, file: &AdapterFile) -> Result<Arc<Adapter>, Error> {
        let adapter = Adapter::of_file(&self.plan, file)?;
        if adapter.score().is_some() {
            return Err(Error::Model(ModelError::Adapter {
                part: "score.weight".into(),
                found: "a classifier's head".into(),
                expected: "an adapter that answers\nhint: `qwenkit classify --adapter ...` asks a classifier".into(),
            }));
        }
        Ok(Arc::new(adapter))
    }

    /// Asks; the answer comes piece by piece.
    ///
    /// # Errors
    /// When the prompt cannot be made, is longer than the context, or a setting is wrong.
    pub fn ask(&self, ask: Ask) -> Result<Answer, Error> {
        let (listener, events) = answer::listening();
        let (request, plan) = self.request(ask)?;
        Ok(Answer::new(events, Transcript::new(self.submit(request, listener)?, plan)))
    }

    /// Asks several questions that are answered together; whoever hears the events puts them into the transcripts, which
    /// come in the order of the questions.
    ///
    /// # Errors
    /// As `ask`, and when too many requests wait. Nothing is asked then.
    pub fn start(&self, asks: Vec<(Ask, Listener)>) -> Result<Vec<Transcript>, Error> {
        let (mut requests, mut plans) = (Vec::new(), Vec::new());
        for (ask, listener) in asks {
            let (request, plan) = self.request(ask)?;
            requests.push((request, listener));
            plans.push(plan);
        }
        let cancellers = self.engine.submit(requests)?;
        Ok(cancellers.into_iter().zip(plans).map(|(canceller, plan)| Transcript::new(canceller, plan)).collect())
    }

    /// What a question is to the engine, and what its transcript is made of.
    fn request(&self, ask: Ask) -> Result<(Request, TranscriptPlan), Error> {
        let asked = Instant::now();
        self.check_head()?;
        let ChatPrompt { ids, opening } = self.encode(&ask.prompt)?;
        let (prompt_ids, visuals) = self.place(&ask.prompt, ids, ask.visuals)?;
        self.check_length(prompt_ids.len())?;
        let seed = ask.sampling.seed.unwrap_or_else(Random::fresh_seed);
        let mut stop_tokens = if ask.ignore_stop_tokens { Vec::new() } else { self.text.stop_tokens.clone() };
        stop_tokens.extend(ask.stop_tokens);
        let guide = ask.hold.guide(opening, &self.text.tokenizer, &self.text.stop_tokens);
        let request = Request {
            prompt: prompt_ids.clone(),
            visuals,
            goal: Goal::Answer,
            sampling: Sampling { seed: Some(seed), ..ask.sampling },
            max_tokens: ask.max_tokens.unwrap_or(usize::MAX).min(self.info.context_tokens - prompt_ids.len()),
            min_tokens: ask.min_tokens,
            stop_tokens: stop_tokens.clone(),
            logprobs: ask.logprobs,
            prompt_logprobs: ask.prompt_logprobs,
            priority: ask.priority,
            guide,
            adapter: ask.adapter,
        };
        let decoder = StreamDecoder::new(&self.text.tokenizer, false);
        let (stop, min_tokens) = (ask.stop, ask.min_tokens);
        Ok((request, TranscriptPlan { decoder, stop, stop_tokens, prompt_ids, opening, min_tokens, seed, asked }))
    }

    /// Puts visuals into a prompt.
    fn place(
        &self,
        prompt: &Prompt,
        ids: Vec<TokenId>,
        visuals: Vec<Visual>,
    ) -> Result<(Vec<TokenId>, Vec<Placed>), Error> {
        if visuals.is_empty() {
            return Ok((ids, Vec::new()));
        }
        let Some(vision) = self.vision() else {
            return Err(self.blindness());
        };
        match prompt {
            Prompt::Ids(_) => vision.place(&ids, visuals).map(|placed| (ids, placed)),
            Prompt::Chat(_) | Prompt::Text(_) => vision.expand(&ids, visuals),
        }
    }

    pub(crate) fn judge(&self) -> Option<&[f32]> {
        self.judge.as_deref()
    }

    /// Refuses what only a model with an output head can say.
    pub(crate) fn check_head(&self) -> Result<(), Error> {
        if self.info.has_head { Ok(()) } else { Err(Error::Headless { origin: self.origin.clone() }) }
    }

    /// Refuses a prompt that leaves no room for an answer.
    pub(crate) fn check_length(&self, prompt_tokens: usize) -> Result<(), Error> {
        let context_tokens = self.info.context_tokens;
        if prompt_tokens < context_tokens {
            return Ok(());
        }
        let hint = match self.info.model_context_tokens > context_tokens {
            true => format!(", or raise --ctx (the model takes up to {})", self.info.model_context_tokens),
            false => ", or take a model with a longer context".to_owned(),
        };
        Err(Error::PromptTooLong { prompt_tokens, context_tokens, hint })
    }

    pub(crate) fn submit(&self, request: Request, listener: Listener) -> Result<Canceller, Error> {
        self.engine.submit(vec![(request, listener)])?.pop().ok_or(Error::Stopped)
    }

    /// How busy the engine is.
    pub fn load(&self) -> Load {
        self.engine.load()
    }

    /// The tokens of a prompt without visuals.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prompt_ids(&self, prompt: &Prompt) -> Result<Vec<TokenId>, Error> {
        self.prompt_ids_with(prompt, Vec::new())
    }

    /// The tokens of a prompt with these visuals in it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prompt_ids_with(&self, prompt: &Prompt, visuals: Vec<Visual>) -> Result<Vec<TokenId>, Error> {
        let ids = self.encode(prompt)?.ids;
        Ok(self.place(prompt, ids, visuals)?.0)
    }

    fn encode(&self, prompt: &Prompt) -> Result<ChatPrompt, Error> {
        let unopened = |ids| ChatPrompt { ids, opening: Opening::Unopened };
        match prompt {
            Prompt::Ids(ids) => Ok(unopened(ids.clone())),
            Prompt::Text(text) => Ok(unopened(self.text.tokenizer.encode(text, SpecialTokens::Parse)?)),
            Prompt::Chat(input) => match &self.text.template {
                Some(template) => Ok(encode_chat(template, &self.text.tokenizer, input)?),
                None => Err(Error::NoTemplate { origin: self.origin.clone() }),
            },
        }
    }

    /// A form that an answer can be held to. The first one takes a while.
    ///
    /// # Errors
    /// When the form is wrong or cannot be enforced.
    pub fn grammar(&self, form: &Form) -> Result<Grammar, Error> {
        let factory = match self.grammars.get() {
            Some(factory) => factory,
            None => {
                let end = self.text.stop_tokens.first().copied().unwrap_or(TokenId(0));
                let made = GrammarFactory::new(&self.text.tokenizer, end)?;
                self.grammars.get_or_init(|| made)
            }
        };
        Ok(factory.compile(form)?)
    }
}

/// Refuses files without a whole block that guesses tokens where nothing else is to guess, before they are loaded.
fn refuse_without_block(files: &ModelFiles) -> Result<(), Error> {
    let plan = arch::plan(files)?;
    if plan.mtp.is_some() {
        return Ok(());
    }
    let found = arch::mtp_gap(files, &plan).unwrap_or_else(|| "none".to_owned());
    Err(ModelError::NoMtp { path: files.path().to_owned(), found, architecture: plan.architecture }.into())
}

/// The tower that lets `model` see.
fn eyes(
    model: &Model,
    files: &ModelFiles,
    mmproj: Option<&ModelFiles>,
    compute: &Compute,
    progress: &mut dyn FnMut(LoadEvent),
) -> Result<Eyes, Error> {
    let tower = Tower::load(files, mmproj, model.plan(), compute, progress)?;
    let info = VisionInfo::of(model.plan(), &tower).ok_or(Error::Blind)?;
    Ok(Eyes::new(tower, info))
}
