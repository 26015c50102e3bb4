//! What a run keeps for pictures: samples of every engine, and its steps.

use forebay_types::Leaning;
use serde::Serialize;

use crate::clock::Time;

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecordSettings {
    /// Seconds between two samples of an engine; above 0.
    pub sample_seconds: f64,
    /// Steps that are kept, of all engines together; the first ones.
    pub steps_max: usize,
}

/// One engine at one moment, all its ranks together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// When, seconds.
    pub at_seconds: f64,
    /// Sequences that wait.
    pub waiting: u32,
    /// Sequences that run.
    pub running: u32,
    /// Share of the KV pool that they hold.
    pub kv_use: f64,
    /// What it is kept for.
    pub leaning: Leaning,
}

/// One step of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepRecord {
    /// Which engine, from 0.
    pub engine: u32,
    /// When it began, seconds.
    pub at_seconds: f64,
    /// How long it took.
    pub seconds: f64,
    /// Prompt tokens that it computed, of all ranks.
    pub prefill_tokens: u32,
    /// Sequences that decoded, of all ranks.
    pub decodes: u32,
}

/// What was kept of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Record {
    /// Of each engine, in order of time.
    pub samples: Vec<Vec<Sample>>,
    /// In order of their beginnings.
    pub steps: Vec<StepRecord>,
    /// Steps that were not kept.
    pub steps_left_out: u64,
    steps_max: usize,
}

impl Record {
    pub(crate) fn new(settings: &RecordSettings, engines: usize) -> Self {
        Self { samples: vec![Vec::new(); engines], steps_max: settings.steps_max, ..Self::default() }
    }

    pub(crate) fn sample(&mut self, engine: usize, sample: Sample) {
        self.samples[engine].push(sample);
    }

    pub(crate) fn step(&mut self, engine: u32, at: Time, seconds: f64, prefill_tokens: u32, decodes: u32) {
        if self.steps.len() < self.steps_max {
            self.steps.push(StepRecord {
                engine,
                at_seconds: at.seconds(),
                seconds,
                prefill_tokens,
                decodes,
            });
        } else {
            self.steps_left_out += 1;
        }
    }
}
