//! Every bound of the HTTP side, with its default and the reason for it.

use std::time::Duration;

use forebay_text::PrefixCacheLimits;

/// Bounds of connections and bodies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpLimits {
    /// Open connections of one listener. At the bound the one that has been idle for longest is closed for a new client;
    /// while none is, later clients wait in the kernel's backlog. Default 16,384: with two descriptors to spare for each it
    /// fits a limit of 65,536.
    pub connections_max: usize,
    /// Bytes of one request's body; more is answered with 413. Default 16 MiB, several times a 1M-token prompt.
    pub body_bytes_max: usize,
    /// Bytes of all bodies above 64 KiB together, while they are read and worked on; one more is answered with 503.
    /// Default 1 GiB: 64 of the largest.
    pub bodies_bytes_max: usize,
    /// Bytes of one request's head; more is answered with 431. Default 32 KiB.
    pub header_bytes_max: usize,
    /// Time to send a whole head, which is also how long a kept-alive connection may stay idle. Default 60 s.
    pub header_read_timeout: Duration,
    /// Time to send a whole body; a slower one is answered with 408. Default 60 s: 16 MiB at 280 kB/s.
    pub body_read_timeout: Duration,
    /// Bytes of a body that must arrive each second, on average and after 10 s of grace; a slower one is answered with
    /// 408. Default 1 KiB; 0 takes any.
    pub body_bytes_per_second_min: usize,
    /// Time that a client may take no byte of its answer before its connection is closed. Default 60 s. Enforced by the
    /// kernel (`TCP_USER_TIMEOUT`), on Linux.
    pub write_stall_timeout: Duration,
    /// Time that running answers have to finish after shutdown began (`shutdown_seconds_max`). Default 30 s.
    pub shutdown_max: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            connections_max: 16_384,
            body_bytes_max: 16 * 1024 * 1024,
            bodies_bytes_max: 1024 * 1024 * 1024,
            header_bytes_max: 32 * 1024,
            header_read_timeout: Duration::from_secs(60),
            body_read_timeout: Duration::from_secs(60),
            body_bytes_per_second_min: 1024,
            write_stall_timeout: Duration::from_secs(60),
            shutdown_max: Duration::from_secs(30),
        }
    }
}

/// Bounds of what one request may ask for. Beyond one of them it is refused with the field and the bound named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestLimits {
    /// Answers to one prompt (`n`). Default 16.
    pub choices_max: u32,
    /// Prompts of one `/v1/completions` request. Default 64.
    pub prompts_max: usize,
    /// Answers of one request: prompts times `n`. Default 128.
    pub sequences_max: usize,
    /// Strings in `stop`. Default 16; OpenAI takes 4.
    pub stop_strings_max: usize,
    /// Bytes of one string in `stop`; that much text may be held back. Default 256.
    pub stop_string_bytes_max: usize,
    /// Ids in `stop_token_ids`. Default 64.
    pub stop_token_ids_max: usize,
    /// Alternatives reported for each token (`top_logprobs`, or `logprobs` of `/v1/completions`). Default 20.
    pub top_logprobs_max: u8,
    /// Tokens that a chat answer may have when the request names no limit; the context bounds it too. Default 4,096.
    pub output_tokens_default_max: u32,
    /// Bytes of text that are tokenised on the connection's own thread; longer ones go to the pool for blocking work,
    /// so that they do not hold up other streams. Default 16 KiB, about a millisecond.
    pub inline_text_bytes_max: usize,
    /// Bytes of recent prompts' text and tokens that are remembered, so that they are not tokenised again. Default
    /// 64 MiB; 0 remembers nothing.
    pub text_cache_bytes_max: usize,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            choices_max: 16,
            prompts_max: 64,
            sequences_max: 128,
            stop_strings_max: 16,
            stop_string_bytes_max: 256,
            stop_token_ids_max: 64,
            top_logprobs_max: 20,
            output_tokens_default_max: 4_096,
            inline_text_bytes_max: 16 * 1024,
            text_cache_bytes_max: PrefixCacheLimits::default().bytes_max,
        }
    }
}
