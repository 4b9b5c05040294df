//! Lists of administrators, in pages by number.

use serde::Deserialize;
use utoipa::IntoParams;

use super::errors::ApiError;

/// More than any platform has.
const PAGE_MAX: i64 = 1_000_000;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Paged {
    /// From 1.
    page: Option<i64>,
}

impl Paged {
    pub fn number(&self) -> Result<i64, ApiError> {
        let page = self.page.unwrap_or(1);
        if (1..=PAGE_MAX).contains(&page) {
            Ok(page)
        } else {
            Err(ApiError::invalid("page", format!("must be from 1 to {PAGE_MAX}")))
        }
    }
}
