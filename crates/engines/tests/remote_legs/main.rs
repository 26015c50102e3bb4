//! Legs on attached engines, against servers that do exactly what a test says.

mod client;
mod doubles;
mod faults;
mod hand_over;
mod reply;
mod rig;
mod tokens;
