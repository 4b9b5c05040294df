//! Which processor this is, as far as a saved state cares.

/// `GenuineIntel 6-143-8`: vendor, family, model and stepping; empty where the kernel does not tell.
pub fn model() -> String {
    parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()).unwrap_or_default()
}

fn parse(text: &str) -> Option<String> {
    let first = text.split("\n\n").next()?;
    let field = |name: &str| {
        let line = first.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim())
    };
    let (vendor, family, model) = (field("vendor_id")?, field("cpu family")?, field("model")?);
    Some(format!("{vendor} {family}-{model}-{}", field("stepping")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_first_processor() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nstepping\t: 8\n\nprocessor\t: 1\n";
        assert_eq!(parse(text).as_deref(), Some("GenuineIntel 6-143-8"));
        assert_eq!(parse("processor : 0\n"), None);
    }
}
