//! How often something was tried within a window of time: for what must not be guessed, and for mail that must not be a weapon.

use std::time::Duration;

use crate::{Store, StoreError};

impl Store {
    /// Counts one try, before it is looked at, so that many at once count as many. The seconds until the window ends when there were
    /// more than `max` in it.
    pub async fn attempt(&self, subject: &[u8; 32], max: i32, window: Duration) -> Result<Option<u32>, StoreError> {
        let row = sqlx::query!(
            r#"insert into attempts (subject, count, window_ends_at) values ($1, 1, now() + make_interval(secs => $2))
               on conflict (subject) do update set
                   count = case when attempts.window_ends_at < now() then 1 else least(attempts.count, 1000000) + 1 end,
                   window_ends_at = case when attempts.window_ends_at < now() then excluded.window_ends_at
                       else attempts.window_ends_at end
               returning count, extract(epoch from window_ends_at - now())::float8 as "left!""#,
            subject,
            window.as_secs_f64()
        )
        .fetch_one(&self.pool)
        .await?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a window has minutes")]
        Ok((row.count > max).then(|| row.left.ceil().clamp(1.0, 86_400.0) as u32))
    }

    /// It went well: what came before does not count.
    pub async fn forget_attempts(&self, subject: &[u8; 32]) -> Result<(), StoreError> {
        sqlx::query!("delete from attempts where subject = $1", subject).execute(&self.pool).await?;
        Ok(())
    }
}
