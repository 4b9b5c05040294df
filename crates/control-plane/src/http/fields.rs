//! Fields that people fill in: addresses, names, passwords. Each is checked at the edge, in one way everywhere.

use super::errors::ApiError;
use crate::passwords::{PASSWORD_BYTES_MAX, PASSWORD_CHARS_MIN};

/// Of RFC 5321: 64 before the @, 255 after it; nobody's is that long.
const EMAIL_BYTES_MAX: usize = 254;

/// In lower case, without blanks around it. What has no one `@`, or could be more than an address in a header, is refused.
pub fn email(text: &str) -> Result<String, ApiError> {
    let email = text.trim().to_lowercase();
    let is_plain = |c: char| !c.is_control() && !c.is_whitespace() && !"<>()[],;:\\\"".contains(c);
    let has_sides = email.split_once('@').is_some_and(|(name, site)| {
        !name.is_empty() && !site.is_empty() && !site.contains('@') && !site.starts_with('.') && !site.ends_with('.')
    });
    if email.len() <= EMAIL_BYTES_MAX && has_sides && email.chars().all(is_plain) && !text.contains(['\r', '\n']) {
        Ok(email)
    } else {
        Err(ApiError::invalid("email", "must be an address such as name@example.org"))
    }
}

pub fn display_name(field: &str, text: &str, chars_max: usize) -> Result<String, ApiError> {
    let name = text.trim();
    if name.is_empty() || name.chars().count() > chars_max || name.chars().any(is_misleading) {
        return Err(ApiError::invalid(field, format!("must have 1 to {chars_max} printable characters")));
    }
    Ok(name.to_owned())
}

pub fn team_name(text: &str) -> Result<String, ApiError> {
    let name = text.trim();
    let is_allowed = |c: char| c.is_alphanumeric() || " _-@'".contains(c);
    if name.is_empty() || name.chars().count() > 128 || !name.chars().all(is_allowed) {
        return Err(ApiError::invalid("name", "must have 1 to 128 letters, digits, blanks and _ - @ '"));
    }
    Ok(name.to_owned())
}

/// Its length is looked at before it is hashed.
pub fn new_password(field: &str, text: &str) -> Result<(), ApiError> {
    if text.len() > PASSWORD_BYTES_MAX || text.chars().count() < PASSWORD_CHARS_MIN || text.trim().is_empty() {
        let reason =
            format!("must have at least {PASSWORD_CHARS_MIN} characters and at most {PASSWORD_BYTES_MAX} bytes");
        return Err(ApiError::invalid(field, reason));
    }
    Ok(())
}

/// Control characters, and those that change the direction of the text around them.
fn is_misleading(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_one_form() {
        assert_eq!(email(" Ada+x@Example.ORG ").unwrap(), "ada+x@example.org");
        assert!(email("admin@localhost").is_ok());
        let long = format!("{}@b", "a".repeat(254));
        for wrong in
            ["", "@", "a@", "@b", "a", "a@b@c", "a b@c", "a@b\r\nBcc: c@d", "\"a\"@b", "<a@b>", "a@b\n", "a@.b", &long]
        {
            assert!(email(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn passwords_have_a_length() {
        assert!(new_password("password", "12345678").is_ok());
        assert!(new_password("password", "äöüßéèàâ").is_ok());
        for wrong in ["", "1234567", "         ", &"x".repeat(1025)] {
            assert!(new_password("password", wrong).is_err());
        }
    }

    #[test]
    fn names_are_printable() {
        assert!(display_name("name", "Ada <3", 100).is_ok());
        assert!(display_name("name", "a\u{202e}b", 100).is_err());
        assert!(display_name("name", &"x".repeat(101), 100).is_err());
        assert!(team_name("O'Neil @ home_1").is_ok());
        assert!(team_name("<b>").is_err());
    }
}
