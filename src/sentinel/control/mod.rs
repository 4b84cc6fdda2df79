//! The controller: starts everything, keeps it in step with the configuration, and ends it in good order.

mod core;
mod intake;
mod logfile;
mod metrics;
mod privileges;
mod run;
mod seal;
mod socket;
mod state;
mod system;
mod taskbook;

pub use core::{CoreOptions, CoreStats};
pub use privileges::USER;
pub use run::{run, settings, socket_path};
pub use socket::{SOCKET, ask, ask_by};
pub use state::State;
