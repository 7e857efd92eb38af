//! `murmur completions` and `murmur man`: pages made from the definitions.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::{args::Cli, ui};

pub(super) fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "murmur", &mut script);
    ui::print(&String::from_utf8_lossy(&script))
}

pub(super) fn man(directory: Option<&Path>) -> anyhow::Result<()> {
    match directory {
        Some(directory) => {
            std::fs::create_dir_all(directory).with_context(|| format!("creating {}", directory.display()))?;
            clap_mangen::generate_to(Cli::command(), directory)
                .with_context(|| format!("writing manual pages to {}", directory.display()))
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            ui::print(&String::from_utf8_lossy(&page))
        }
    }
}
