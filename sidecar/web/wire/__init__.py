"""What requests and answers look like on the wire: models, headers, bodies and problem documents."""
