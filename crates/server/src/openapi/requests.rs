//! What requests hold, by path: names with their JSON types, for `/openapi.json`.

/// A path, the names that must be there, and its names with their JSON types; `any` where there are several.
pub(super) type Known = (&'static str, &'static [&'static str], &'static [Group]);

/// Names with their JSON types.
type Group = &'static [(&'static str, &'static str)];

/// How an answer is generated and sent, in OpenAI's interfaces.
const ANSWER: Group = &[
    ("temperature", "number"),
    ("top_p", "number"),
    ("top_k", "integer"),
    ("min_p", "number"),
    ("repetition_penalty", "number"),
    ("presence_penalty", "number"),
    ("frequency_penalty", "number"),
    ("logit_bias", "object"),
    ("seed", "integer"),
    ("stop", "any"),
    ("stop_token_ids", "array"),
    ("min_tokens", "integer"),
    ("ignore_eos", "boolean"),
    ("stream", "boolean"),
    ("stream_options", "object"),
];

/// Switches for thinking, of which one is enough.
const THINKING: Group = &[
    ("enable_thinking", "boolean"),
    ("think", "any"),
    ("thinking", "any"),
    ("thinking_budget", "integer"),
    ("reasoning_effort", "string"),
    ("reasoning", "object"),
    ("chat_template_kwargs", "object"),
];

const TOOLS: Group = &[("tools", "array"), ("tool_choice", "any"), ("parallel_tool_calls", "boolean")];

const MODEL: Group = &[("model", "string")];

const EMBED: Group =
    &[("input", "any"), ("prompt", "any"), ("dimensions", "integer"), ("truncate", "boolean"), ("options", "object")];

const SCORE: Group = &[("text_1", "any"), ("text_2", "any"), ("instruction", "string")];

const RERANK: Group = &[
    ("query", "string"),
    ("documents", "array"),
    ("top_n", "integer"),
    ("return_documents", "boolean"),
    ("instruction", "string"),
];

const MESSAGES: Group = &[
    ("system", "any"),
    ("messages", "array"),
    ("tools", "array"),
    ("tool_choice", "object"),
    ("thinking", "object"),
    ("output_config", "object"),
];

/// Requests by path.
pub(super) const REQUESTS: &[Known] = &[
    (
        "/v1/load_lora_adapter",
        &["lora_name", "lora_path"],
        &[&[("lora_name", "string"), ("lora_path", "string"), ("base_model_name", "string")]],
    ),
    ("/v1/unload_lora_adapter", &["lora_name"], &[&[("lora_name", "string")]]),
    (
        "/v1/chat/completions",
        &["messages"],
        &[
            MODEL,
            &[
                ("messages", "array"),
                ("max_completion_tokens", "integer"),
                ("n", "integer"),
                ("logprobs", "boolean"),
                ("top_logprobs", "integer"),
                ("response_format", "object"),
                ("structured_outputs", "object"),
            ],
            TOOLS,
            THINKING,
            ANSWER,
        ],
    ),
    (
        "/v1/completions",
        &["prompt"],
        &[
            MODEL,
            &[("prompt", "any"), ("max_tokens", "integer"), ("n", "integer"), ("echo", "boolean"), ("logprobs", "any")],
            ANSWER,
        ],
    ),
    (
        "/v1/responses",
        &["input"],
        &[
            MODEL,
            &[
                ("input", "any"),
                ("instructions", "string"),
                ("previous_response_id", "string"),
                ("max_output_tokens", "integer"),
                ("text", "object"),
                ("store", "boolean"),
                ("background", "boolean"),
                ("metadata", "object"),
            ],
            TOOLS,
            THINKING,
            ANSWER,
        ],
    ),
    (
        "/v1/embeddings",
        &["input"],
        &[
            MODEL,
            &[("input", "any"), ("dimensions", "integer"), ("encoding_format", "string"), ("instruction", "string")],
        ],
    ),
    ("/v1/rerank", &["query", "documents"], &[MODEL, RERANK]),
    ("/rerank", &["query", "documents"], &[MODEL, RERANK]),
    ("/v1/score", &["text_1", "text_2"], &[MODEL, SCORE]),
    ("/score", &["text_1", "text_2"], &[MODEL, SCORE]),
    (
        "/v1/batches",
        &["input_file_id", "endpoint", "completion_window"],
        &[&[
            ("input_file_id", "string"),
            ("endpoint", "string"),
            ("completion_window", "string"),
            ("metadata", "object"),
        ]],
    ),
    (
        "/v1/fine_tuning/jobs",
        &["model", "training_file"],
        &[
            MODEL,
            &[
                ("training_file", "string"),
                ("validation_file", "string"),
                ("method", "object"),
                ("suffix", "string"),
                ("seed", "integer"),
                ("metadata", "object"),
            ],
        ],
    ),
    (
        "/v1/messages",
        &["model", "max_tokens", "messages"],
        &[
            MODEL,
            &[
                ("max_tokens", "integer"),
                ("temperature", "number"),
                ("top_p", "number"),
                ("top_k", "integer"),
                ("stop_sequences", "array"),
                ("stream", "boolean"),
            ],
            MESSAGES,
        ],
    ),
    ("/v1/messages/count_tokens", &["model", "messages"], &[MODEL, MESSAGES]),
    (
        "/api/chat",
        &["model"],
        &[
            MODEL,
            &[
                ("messages", "array"),
                ("tools", "array"),
                ("think", "any"),
                ("format", "any"),
                ("stream", "boolean"),
                ("options", "object"),
            ],
        ],
    ),
    (
        "/api/generate",
        &["model"],
        &[
            MODEL,
            &[
                ("prompt", "string"),
                ("system", "string"),
                ("raw", "boolean"),
                ("images", "array"),
                ("think", "any"),
                ("format", "any"),
                ("stream", "boolean"),
                ("options", "object"),
            ],
        ],
    ),
    ("/api/show", &["model"], &[MODEL, &[("verbose", "boolean")]]),
    ("/api/embed", &["model"], &[MODEL, EMBED]),
    ("/api/embeddings", &["model"], &[MODEL, EMBED]),
    (
        "/tokenize",
        &[],
        &[
            MODEL,
            &[
                ("prompt", "string"),
                ("messages", "array"),
                ("return_token_strs", "boolean"),
                ("parse_special", "boolean"),
                ("add_generation_prompt", "boolean"),
            ],
        ],
    ),
    ("/detokenize", &["tokens"], &[MODEL, &[("tokens", "array")]]),
    (
        "/apply-template",
        &["messages"],
        &[MODEL, &[("messages", "array"), ("tools", "array"), ("add_generation_prompt", "boolean")], THINKING],
    ),
];
