//! Files: `POST /v1/sandboxes/{id}/files/write` (multipart: `path`, `file`), `POST .../files/read` (JSON), and their `stream/` forms.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReadFile {
    /// Absolute, or relative to the home of the default user.
    pub path: String,
}
