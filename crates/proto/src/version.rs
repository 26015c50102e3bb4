//! Which versions of the protocol work together.

/// The wire version of this build; see "Versions" in `fleet.proto` for when it rises.
pub const WIRE_VERSION: u32 = 1;

/// Two processes whose versions are too far apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "this side speaks wire version {own}, the other side {theirs}; only neighbouring versions work together: upgrade \
     {}",
    if own < theirs { "this side" } else { "the other side" }
)]
pub struct VersionError {
    /// Of this side.
    pub own: u32,
    /// Of the other side.
    pub theirs: u32,
}

/// The version that both sides speak from now on: the lower of both, if they are equal or neighbours. A gateway calls
/// it with what Hello says, an agent with what Welcome says; `own` is [`WIRE_VERSION`].
///
/// # Errors
/// The versions are more than one apart, or the other side names none.
pub fn agree(own: u32, theirs: u32) -> Result<u32, VersionError> {
    if theirs == 0 || own.abs_diff(theirs) > 1 {
        return Err(VersionError { own, theirs });
    }
    Ok(own.min(theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_agree_on_the_lower_version() {
        //   own  theirs  agreed
        let rows =
            [(1, 1, Some(1)), (2, 1, Some(1)), (1, 2, Some(1)), (3, 1, None), (1, 3, None), (1, 0, None)];
        for (own, theirs, agreed) in rows {
            assert_eq!(agree(own, theirs).ok(), agreed, "{own} and {theirs}");
        }
    }

    #[test]
    fn the_error_says_which_side_to_upgrade() {
        let text = |own, theirs| agree(own, theirs).expect_err("too far apart").to_string();
        assert!(text(1, 3).ends_with("upgrade this side"), "{}", text(1, 3));
        assert!(text(5, 3).ends_with("upgrade the other side"), "{}", text(5, 3));
    }
}
