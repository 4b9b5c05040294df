//! The platform's own secrets, sealed by a key that the database does not hold.

use crate::{Store, StoreError};

impl Store {
    pub async fn keyring_get(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(sqlx::query_scalar!("select sealed from keyring where name = $1", name).fetch_optional(&self.pool).await?)
    }

    /// Keeps what is there already: of two replicas that start together, one wins, and both get its value.
    pub async fn keyring_keep(&self, name: &str, sealed: &[u8]) -> Result<Vec<u8>, StoreError> {
        sqlx::query!("insert into keyring (name, sealed) values ($1, $2) on conflict (name) do nothing", name, sealed)
            .execute(&self.pool)
            .await?;
        Ok(sqlx::query_scalar!("select sealed from keyring where name = $1", name).fetch_one(&self.pool).await?)
    }
}
