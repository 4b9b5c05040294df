//! What the control plane says of the platform as a whole.

mod replica;

use replica::{Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};

async fn fleet(replica: &Replica) -> Value {
    let answer = replica.as_admin(Method::GET, "/v1/admin/fleet", None).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body
}

#[tokio::test(flavor = "multi_thread")]
async fn the_platform_is_shown_as_it_is() {
    let replica = Replica::start().await;
    let mut fresh = fleet(&replica).await;
    // A replica takes its lock in a task of its own.
    for _ in 0..100 {
        if fresh["workers"] == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        fresh = fleet(&replica).await;
    }
    assert_eq!((&fresh["workers"], &fresh["hosts"], &fresh["sends_mail"]), (&json!(1), &json!([]), &json!(false)));
    assert_eq!(fresh["schema"]["database"], fresh["schema"]["program"]);
    assert!(fresh["schema"]["program"].as_i64().unwrap() >= 9 && fresh.get("brake_since").is_none(), "{fresh}");
    let (_other, _) = replica.another().await;
    for _ in 0..100 {
        if fleet(&replica).await["workers"] == 2 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    replica
        .database
        .sql(
            "insert into hosts (id, kind, state, agent_version, unclaimed, created_by, last_heartbeat_at)
                 values (gen_random_uuid(), 'regular', 'active', '0.0.1', '{sbx}', 'test', now() - interval '1 hour');
             insert into silence_brake (silent, hosts) values (3, 4);
             insert into outbox (id, kind, sealed, created_at, next_at, expires_at)
                 values (gen_random_uuid(), 'test', 'x', now() - interval '1 hour', now() + interval '1 hour', now() + interval '1 day')",
        )
        .await;
    let shown = fleet(&replica).await;
    assert_eq!(shown["workers"], 2);
    let host = &shown["hosts"][0];
    assert_eq!((&host["status"], &host["unclaimed"]), (&json!("unreachable"), &json!(["sbx"])), "{shown}");
    assert!(shown["brake_since"].is_string());
    assert_eq!(shown["outbox"]["count"], 1);
    assert!(shown["outbox"]["oldest_sec"].as_f64().unwrap() > 3500.0, "{shown}");

    // The numbers are the platform's, and no tenant's business.
    let refused = replica.call(Who::Key(&replica.key), Method::GET, "/v1/admin/fleet", None).await;
    assert!(matches!(refused.error().0, 401 | 403));
}
