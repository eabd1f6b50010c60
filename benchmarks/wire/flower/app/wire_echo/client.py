"""A ClientApp that answers with the arrays it got."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, _: Context) -> Message:
    """The same ArrayRecord."""
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)
