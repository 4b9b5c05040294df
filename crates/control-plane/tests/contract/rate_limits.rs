//! Too many requests of one sender: refused, cheaply, and without harm to others.

use std::time::Instant;

use control_plane::rate_settings::RateSettings;
use control_plane::run;
use reqwest::Method;

use crate::replica::{Replica, Who};

#[tokio::test(flavor = "multi_thread")]
async fn one_sender_is_held_back_and_others_are_not() {
    let mut replica = Replica::start().await;
    replica.config.rates = RateSettings { rate_per_key: Some(20), rate_per_team: Some(30) }.rates();
    let serving = run::start(&replica.config).await.unwrap();
    let free = std::mem::replace(&mut replica.url, format!("http://{}", serving.address));
    let calls = (0..2000).map(|_| replica.as_team(Method::GET, "/v1/teams/self/quotas", None));
    let began = Instant::now();
    let answers = futures::future::join_all(calls).await;
    let took = began.elapsed();
    let (passed, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    let most = 40.0 + 20.0 * (took.as_secs_f64() + 1.0);
    assert!(passed.len() >= 40 && (passed.len() as f64) <= most, "{} of 2000 in {took:?}", passed.len());
    for answer in &refused {
        assert_eq!(answer.error(), (429, "rate_limited"));
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!(answer.headers["ratelimit-limit"], "20");
        assert_eq!(answer.headers["ratelimit-remaining"], "0");
    }
    assert_eq!(passed[0].headers["ratelimit-limit"], "20");
    println!("2000 requests in {took:?}, {} of them passed", passed.len());
    // Another team, a person, and whoever needs no credential.
    let foreign = replica.foreign_key().await;
    let theirs = replica.call(Who::Key(&foreign), Method::GET, "/v1/teams/self/quotas", None).await;
    assert_eq!(theirs.status, 200, "{}", theirs.body);
    assert_eq!(replica.as_admin(Method::GET, "/v1/me", None).await.status, 200);
    assert_eq!(replica.call(Who::Nobody, Method::GET, "/health", None).await.status, 200);
    // Several keys of one team have the team's rate together.
    replica.url = free;
    let mut keys = Vec::new();
    for _ in 0..4 {
        let made = replica.as_team(Method::POST, "/v1/api-keys", None).await;
        keys.push(made.body["key"].as_str().unwrap().to_owned());
    }
    replica.url = format!("http://{}", serving.address);
    let began = Instant::now();
    let calls = (0..200).map(|n| replica.call(Who::Key(&keys[n % 4]), Method::GET, "/v1/teams/self/quotas", None));
    let answers = futures::future::join_all(calls).await;
    let passed = answers.iter().filter(|answer| answer.status == 200).count();
    let most = 60.0 + 30.0 * (began.elapsed().as_secs_f64() + 1.0);
    assert!((passed as f64) <= most && passed < 200, "{passed}");
    serving.stop().await;
}

/// One that guesses credentials is no sender of its own for each guess, but costs the database nothing when it repeats one.
#[tokio::test(flavor = "multi_thread")]
async fn a_credential_that_opens_nothing_is_held_back_as_well() {
    let mut replica = Replica::start().await;
    replica.config.rates = RateSettings { rate_per_key: Some(5), rate_per_team: Some(0) }.rates();
    let serving = run::start(&replica.config).await.unwrap();
    replica.url = format!("http://{}", serving.address);
    let wrong = format!("wrn_{}", "ab".repeat(32));
    let mut last = (0, String::new());
    for _ in 0..30 {
        let answer = replica.call(Who::Key(&wrong), Method::GET, "/v1/sandboxes", None).await;
        let (status, code) = answer.error();
        last = (status, code.to_owned());
    }
    assert!(last == (429, "rate_limited".to_owned()) || last == (401, "unauthorized".to_owned()), "{last:?}");
    let calls = (0..50).map(|_| replica.call(Who::Key(&wrong), Method::GET, "/v1/sandboxes", None));
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().any(|answer| answer.status == 429));
    serving.stop().await;
}
