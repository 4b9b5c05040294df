//! The list of sandboxes, page by page: each once, also of those that were made at the same instant.

mod replica;

use replica::{Replica, Who};
use reqwest::Method;
use serde_json::Value;

fn ids(body: &Value) -> Vec<String> {
    body.as_array().unwrap().iter().map(|sandbox| sandbox["id"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_have_every_sandbox_once() {
    let replica = Replica::start().await;
    let host = replica.host(1 << 20).await;
    for _ in 0..7 {
        replica.sandbox(host).await;
    }
    // Some of the same instant.
    replica.database.sql("update sandboxes set created_at = date_trunc('hour', now()) where id < 'sbm'").await;
    replica.database.sql("update sandboxes set observed = 'killed' where id = (select max(id) from sandboxes)").await;
    let all = replica.as_team(Method::GET, "/v1/sandboxes", None).await;
    assert_eq!((all.status.as_u16(), all.headers.contains_key("link")), (200, false));
    let all = ids(&all.body);
    assert_eq!(all.len(), 6);
    for limit in [1, 2, 4, 6, 7] {
        let mut found = Vec::new();
        let mut next = format!("?limit={limit}");
        loop {
            let page = replica.as_team(Method::GET, &format!("/v1/sandboxes{next}"), None).await;
            assert_eq!(page.status, 200, "{}", page.body);
            found.extend(ids(&page.body));
            let Some(link) = page.headers.get("link") else { break };
            let link = link.to_str().unwrap();
            next = link.strip_prefix('<').and_then(|rest| rest.strip_suffix(">; rel=\"next\"")).unwrap().to_owned();
            assert!(found.len() <= all.len(), "it does not end: {found:?}");
        }
        assert_eq!(found, all, "{limit}");
    }
    let foreign = replica.foreign_key().await;
    for query in ["limit=0", "limit=10001", "limit=x", "before=x", "before=sb0000000000000000000000"] {
        let answer = replica.as_team(Method::GET, &format!("/v1/sandboxes?{query}"), None).await;
        assert_eq!(answer.error(), (400, "invalid_request"), "{query}");
    }
    let theirs = format!("/v1/sandboxes?before={}", all[0]);
    assert_eq!(replica.call(Who::Key(&foreign), Method::GET, &theirs, None).await.error(), (400, "invalid_request"));
}
