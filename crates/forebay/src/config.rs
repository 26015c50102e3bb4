//! `forebay config`: what the settings are, whether a file is right, what they mean.

use std::collections::BTreeMap;

use crate::{
    cli::ConfigCommand,
    exit::Exit,
    settings::{self, Settings},
    table::{Cell, Table},
    terminal::{Terminal, Tone},
};

/// Runs one of the commands.
///
/// # Errors
/// Settings that are wrong.
pub(crate) fn run(
    command: &ConfigCommand,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    match command {
        ConfigCommand::Show { json, settings } => {
            let settings = Settings::load(settings, environment)?;
            if *json {
                terminal.out(&format!("{}\n", serde_json::to_string_pretty(&settings.shown())?))?;
            } else {
                terminal.out(&table(&settings).render(terminal.width(), terminal.paint_out))?;
            }
        }
        ConfigCommand::Check { file } => {
            let settings = Settings::load_file(file)?;
            let given = settings.shown().iter().filter(|line| line.origin != "default").count();
            // `config` itself came from the command line.
            terminal.out(&format!("{file}: {} settings, all good\n", given.saturating_sub(1)))?;
        }
        ConfigCommand::Reference => terminal.out(&settings::reference_page())?,
    }
    Ok(Exit::Ok)
}

fn table(settings: &Settings) -> Table {
    let mut table = Table::default().text("SETTING").text("VALUE").text("FROM");
    for line in settings.shown() {
        let (tone, from) = match line.origin.as_str() {
            "default" => (Tone::Plain, Tone::Faint),
            _ => (Tone::Strong, Tone::Plain),
        };
        table.row(vec![
            Cell::new(line.name, tone),
            Cell::new(line.value, tone),
            Cell::new(line.origin, from),
        ]);
    }
    table
}
