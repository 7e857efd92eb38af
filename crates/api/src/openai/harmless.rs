//! Fields that are accepted without effect, each for a reason. Everything else is honoured or refused.

use crate::{errors::ApiError, fields::Fields};

/// Reads and checks the fields that cannot change an answer.
pub(crate) fn accept(fields: &mut Fields) -> Result<(), ApiError> {
    // Labels for the operator of a shared service. This node keeps no records of its clients.
    fields.string("user")?;
    fields.string("safety_identifier")?;
    // Labels for stored answers; nothing is stored here, see `store`.
    fields.object("metadata")?;
    // A hint where to look for a cached prefix. Here every prompt is looked up whole.
    fields.string("prompt_cache_key")?;
    if fields.boolean("store")? == Some(true) {
        let advice = "This server stores no answers; leave `store` out, or set it to false.";
        return Err(ApiError::unsupported(fields.path("store"), advice));
    }
    if let Some(tier) = fields.string("service_tier")?
        && !matches!(tier.as_str(), "auto" | "default")
    {
        let advice = "This server has one service tier; leave `service_tier` out, or set it to \"auto\".";
        return Err(ApiError::unsupported(fields.path("service_tier"), advice));
    }
    Ok(())
}
