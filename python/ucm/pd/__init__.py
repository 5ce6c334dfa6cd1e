"""The proxy in front of prefill and decode servers: a launcher of the ``ucm-proxy`` binary."""
