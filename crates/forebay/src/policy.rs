//! `forebay policy`: which rule places requests, seen and changed while a server runs: the kill switch.
//!
//! In and out: `/fleet/v1/policy` of the admin address. Start at [`run`].

use serde::{Deserialize, Serialize};

use crate::{cli::PolicyCommand, client::Client, exit::Exit, terminal::Terminal};

/// Where the policy is kept.
const POLICY_PATH: &str = "/fleet/v1/policy";

#[derive(Serialize, Deserialize)]
struct PolicyName {
    policy: String,
}

/// Shows the policy in force, after setting it if that was asked.
///
/// # Errors
/// No server, or no such policy.
pub(crate) async fn run(command: &PolicyCommand, terminal: Terminal) -> anyhow::Result<Exit> {
    let in_force: PolicyName = match command {
        PolicyCommand::Show(door) => Client::new(&door.admin_url, None)?.get_json(POLICY_PATH).await?,
        PolicyCommand::Set { name, door } => {
            let wanted = PolicyName { policy: name.to_string() };
            Client::new(&door.admin_url, None)?.put_json(POLICY_PATH, &wanted).await?
        }
    };
    terminal.out(&format!("{}\n", in_force.policy))?;
    Ok(Exit::Ok)
}
