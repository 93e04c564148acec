"""A page in the browser: `restoring` computes, `page` shows (needs the extra `demo`)."""
